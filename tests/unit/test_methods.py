"""The peers, VisionZip's dominant tokens and DivPrune, against references that share no line with them."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiprune.errors import InvalidInput
from hiprune.v1 import pruner_service_pb2 as pb
from services.pruner import methods
from services.pruner.methods import divprune as module
from services.pruner.methods.divprune import divprune, work
from services.pruner.methods.tokens import Unwanted
from services.pruner.methods.visionzip import visionzip
from services.pruner.selection import TokenKind

DOMINANT, DIVERSE = int(TokenKind.DOMINANT), int(TokenKind.DIVERSE)


# --- references -------------------------------------------------------------------------------------------


def dominant(scores: list[float], keep: int, valid: list[bool]) -> list[int]:
    """A stable sort, written out."""
    order = sorted((index for index in range(len(scores)) if valid[index]), key=lambda i: (-scores[i], i))
    return sorted(order[:keep])


def diverse(features: list[list[int]], keep: int, valid: list[bool]) -> list[int]:
    """DivPrune's algorithm 1 over all pairs in plain floats, no token twice, ties to the lower index."""

    def distance(one: list[int], other: list[int]) -> float:
        lengths = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(x * x for x in other))
        dot = sum(x * y for x, y in zip(one, other, strict=True))
        return round(1 - (dot / lengths if lengths else 0.0), 7)

    left = [index for index in range(len(features)) if valid[index]]
    if keep >= len(left):
        return left
    apart = {(i, j): distance(features[i], features[j]) for i in left for j in left}
    first = max(left, key=lambda i: (min(apart[i, j] for j in left if j != i), -i))
    chosen = [first]
    while len(chosen) < keep:
        rest = [i for i in left if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(apart[i, j] for j in chosen), -i)))
    return sorted(chosen)


@st.composite
def cases(draw) -> tuple[list[list[int]], int, list[bool]]:
    """Features that often coincide, point the same way, or are zero: what ties are made of."""
    width = draw(st.integers(1, 4))
    row = st.lists(st.integers(-3, 3), min_size=width, max_size=width)
    features = draw(st.lists(row, min_size=1, max_size=14))
    valid = draw(st.lists(st.booleans(), min_size=len(features), max_size=len(features)))
    return features, draw(st.integers(1, 16)), valid


# --- DivPrune ---------------------------------------------------------------------------------------------


@given(cases())
def test_divprune_is_greedy_max_min_over_all_pairs(case):
    features, keep, valid = case
    found = divprune(np.array(features, dtype=np.float32), keep=keep, valid=np.array(valid))
    assert found.indices.tolist() == diverse(features, keep, valid)
    assert found.kinds.tolist() == [DIVERSE] * len(found.indices)


def test_divprune_by_hand():
    angles = np.radians([0, 1, 90, 91, 180, 300])
    features = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    # 180° has its nearest at 89°, farther than any other has; then 0° is opposite, 90° between, 300° at 60°
    assert [divprune(features, keep=k).indices.tolist() for k in (1, 2, 3, 4)] == [
        [4],
        [0, 4],
        [0, 2, 4],
        [0, 2, 4, 5],
    ]


def test_the_length_of_a_feature_does_not_count():
    rows = np.random.default_rng(0).standard_normal((40, 8))
    lengths = np.random.default_rng(1).uniform(1e-30, 1e30, (40, 1))
    assert divprune(rows * lengths, keep=9).indices.tolist() == divprune(rows, keep=9).indices.tolist()


@given(st.integers(2, 40), st.integers(0, 9), st.data())
def test_the_way_without_a_table_chooses_the_same(size, seed, data):
    keep = data.draw(st.integers(1, size))
    rows = np.random.default_rng(seed).integers(-2, 3, (size, 3)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TABLE_TOKENS", 0)
        patch.setattr(module, "_CHUNK_ELEMENTS", 64)
        without = divprune(rows, keep=keep).indices.tolist()
    assert without == divprune(rows, keep=keep).indices.tolist()


def test_a_larger_budget_keeps_what_a_smaller_one_does():
    rows = np.random.default_rng(0).standard_normal((60, 12))
    kept = [set(divprune(rows, keep=k).indices.tolist()) for k in range(1, 61)]
    assert all(one < other for one, other in itertools.pairwise(kept))


@pytest.mark.parametrize("table", [0, 4096])
def test_a_choice_that_nobody_wants_any_more_ends_at_the_next_block_or_token(table, monkeypatch):
    monkeypatch.setattr(module, "TABLE_TOKENS", table)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 40 * 10)  # four blocks of 40 tokens, then 8 more choices
    rows = np.random.default_rng(0).standard_normal((40, 3))
    for most in range(12):
        asked = itertools.count(1)
        with pytest.raises(Unwanted):
            divprune(rows, keep=9, is_wanted=lambda most=most, asked=asked: next(asked) <= most)
        assert next(asked) == most + 2
    divprune(rows, keep=9, is_wanted=iter([True] * 12).__next__)


def test_many_tokens_need_no_table_of_all_pairs():
    rows = np.random.default_rng(0).standard_normal((12_000, 2)).astype(np.float32)
    tracemalloc.start()
    divprune(rows, keep=5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12_000**2 * 4 / 10  # a tenth of the table


def test_work_counts_every_pair_once_and_nothing_where_nothing_is_chosen():
    assert work(576, 192, 1024) == 576 * 576 * 1024
    assert work(5000, 100, 1024) == 5000 * (5000 + 4 * 100) * 1024
    assert work(576, 576, 1024) == work(0, 1, 1024) == 0


def test_what_is_accepted_takes_seconds_of_one_core_however_narrow_the_tokens():
    assert work(4096, 1365, 1024) == work(4096, 1, 1024) == module.MAX_WORK
    assert 5 * work(576, 192, 1024) < module.MAX_WORK / 9
    for channels in (1, 64):  # a pair costs its rounding too
        assert work(16_000, 16, channels) <= module.MAX_WORK < work(16_384, 1, channels)
    assert work(262_000, 100, 1) > module.MAX_WORK


@pytest.mark.parametrize(
    ("features", "options", "field"),
    [
        (np.ones((0, 3), np.float32), {"keep": 1}, "features"),
        (np.ones(3, np.float32), {"keep": 1}, "features"),
        (np.ones((3, 2), np.int64), {"keep": 1}, "features"),
        (np.array([[1.0], [np.nan]]), {"keep": 1}, "features"),
        (np.ones((3, 2)), {"keep": 0}, "policy.keep_count"),
        (np.ones((3, 2)), {"keep": 1, "valid": np.ones(4, bool)}, "valid"),
    ],
)
def test_divprune_names_what_does_not_fit(features, options, field):
    with pytest.raises(InvalidInput) as caught:
        divprune(features, **options)
    assert caught.value.field == field


# --- VisionZip --------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=30), st.integers(1, 32), st.data()
)
def test_visionzip_keeps_the_highest_scores_of_valid_tokens(scores, keep, data):
    valid = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    found = visionzip(np.array(scores, dtype=np.float32), keep=keep, valid=np.array(valid))
    assert found.indices.tolist() == dominant(scores, keep, valid)
    assert found.kinds.tolist() == [DOMINANT] * len(found.indices)


@pytest.mark.parametrize(
    ("scores", "options", "field"),
    [
        ([0.1, math.nan], {"keep": 1}, "scores"),
        ([], {"keep": 1}, "scores"),
        ([0.1], {"keep": 0}, "policy.keep_count"),
        ([0.1], {"keep": 1, "valid": np.ones(2, bool)}, "valid"),
    ],
)
def test_visionzip_names_what_does_not_fit(scores, options, field):
    with pytest.raises(InvalidInput) as caught:
        visionzip(np.array(scores, dtype=np.float32), **options)
    assert caught.value.field == field


# --- the interface ----------------------------------------------------------------------------------------


def test_every_method_of_the_wire_is_behind_the_interface():
    assert set(methods.METHODS) == set(pb.Method.values()) - {pb.METHOD_UNSPECIFIED}
