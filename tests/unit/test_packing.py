"""Positions that travel as token ids: every kind of prompt fits, and comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.llm.engines.packing import DoNotFit, pack, unpack


def prompt(kept: float, grids: list[tuple[int, int, int]], text: int, jump: int = 1, seed: int = 0):
    """Positions (3, S) as Qwen2.5-VL counts them: text, then media and text in turn, some tokens kept."""
    draw = np.random.default_rng(seed)
    pieces, at = [], 0
    for grid in [*grids, None]:
        pieces.append(np.tile(np.arange(at, at + text), (3, 1)))
        at += text
        if grid is None:
            break
        slices, height, width = grid
        where = np.indices(grid).reshape(3, -1)
        where[0] *= jump
        stays = np.sort(draw.choice(where.shape[1], max(1, int(kept * where.shape[1])), replace=False))
        pieces.append(at + where[:, stays])
        at += max(slices * jump, height, width)
    return np.concatenate(pieces, axis=1).astype(np.int64)


@pytest.mark.parametrize("kept", [0.01, 0.1, 0.33, 0.9, 1.0])
@pytest.mark.parametrize(
    "grids",
    [[], [(1, 24, 24)], [(1, 128, 128)], [(1, 1800, 9)], [(8, 12, 12)] * 3, [(300, 8, 14)], [(1, 1, 1)]],
    ids=str,
)
@pytest.mark.parametrize("jump", [1, 50])
def test_positions_of_prompts_come_back_as_they_were(kept, grids, jump):
    positions = prompt(kept, grids, text=12, jump=jump)
    numbers = pack(positions)
    assert len(numbers) == positions.shape[1]
    assert min(numbers) >= 0
    assert max(numbers) < 2**30  # tokens are int32 over there
    assert np.array_equal(unpack(numbers, 3), positions)


@given(st.integers(1, 60), st.integers(0, 2**31 - 1), st.integers(1, 3))
def test_counting_on_from_anywhere_fits_from_a_few_tokens_on(length, first, axes):
    first = min(first, 2**31 - 1 - length)
    positions = np.tile(np.arange(first, first + length), (axes, 1)).astype(np.int64)
    if length >= 8:
        assert np.array_equal(unpack(pack(positions), axes), positions)


def test_what_does_not_fit_is_refused_and_never_cut():
    wild = np.random.default_rng(0).integers(0, 2**31, (3, 50))
    with pytest.raises(DoNotFit, match="positions of 50 tokens take"):
        pack(wild)
    with pytest.raises(DoNotFit, match=r"expected \[0, 2\^31\)"):
        pack(np.array([[-1]]))


def test_numbers_that_nobody_packed_are_refused():
    with pytest.raises(ValueError, match="50 numbers hold"):
        unpack([2**30 - 1] * 50, 3)
    with pytest.raises(ValueError, match="10 numbers do not hold"):
        unpack(pack(prompt(1.0, [(1, 4, 4)], 4))[:10], 3)


def test_nothing_packs_to_nothing():
    assert pack(np.zeros((3, 0), np.int64)) == []
    assert unpack([], 3).shape == (3, 0)
