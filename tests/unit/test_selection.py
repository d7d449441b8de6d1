"""Selection, held to the authors' own answers, to worked examples and to a slow reference in plain Python.

The reference (`slow_hiprune_plus_plus`) shares no code with `services.pruner.selection`: it walks lists,
sorts whole, and follows `algorithm.md` sentence by sentence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiprune.budgets import keep_of_ratio
from hiprune.errors import InvalidInput
from services.pruner.selection import (
    BufferShape,
    Selection,
    TextBudget,
    TokenKind,
    everything,
    hiprune,
    hiprune_plus_plus,
    random_tokens,
    strided,
)

A, B, R, T, C = (int(kind) for kind in list(TokenKind)[:5])
Floats = npt.NDArray[np.float32]
GOLDEN = Path(__file__).parents[1] / "golden"
SEED = bytes(range(32))
PINNED = [15, 53, 60, 67, 77, 82, 89, 96]  # random_tokens(100, keep=8, seed=SEED), written down once


def f32(*values: float) -> Floats:
    return np.array(values, dtype=np.float32)


def pairs(selection: Selection) -> list[tuple[int, int]]:
    """(index, kind) of each kept token, as plain numbers."""
    return list(zip(selection.indices.tolist(), selection.kinds.tolist(), strict=True))


def same(left: Selection, right: Selection) -> bool:
    return pairs(left) == pairs(right)


# --- the slow reference ---------------------------------------------------------------------------

STEPS = {
    BufferShape.GRID: [(-1, 0), (1, 0), (0, -1), (0, 1)],
    BufferShape.SQUARE: [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)],
    BufferShape.ROTATED_CROSS: [(-1, -1), (-1, 1), (1, -1), (1, 1)],
    BufferShape.ROW: [(0, -1), (0, 1)],
    BufferShape.COLUMN: [(-1, 0), (1, 0)],
}


def slow_neighbours(i: int, n: int, width: int, shape: BufferShape) -> set[int]:
    if shape == BufferShape.FLAT:
        return {max(0, min(n - 1, j)) for j in (i - 1, i + 1, i - width, i + width)}
    row, column = divmod(i, width)
    found = set()
    for down, right in STEPS[shape]:
        if 0 <= row + down < n // width and 0 <= column + right < width:
            found.add((row + down) * width + column + right)
    return found


def slow_hiprune_plus_plus(
    object_scores: list[float],
    deep_scores: list[float],
    similarity: list[float] | None,
    *,
    width: int,
    keep: int,
    alpha: float,
    beta: float,
    buffer: BufferShape,
    text_budget: TextBudget,
    valid: list[bool],
) -> list[tuple[int, int]]:
    n = len(object_scores)
    allowed = [i for i in range(n) if valid[i]]
    budget = min(keep, len(allowed))
    text = 0 if similarity is None else round(beta * budget)
    room = budget - text if text_budget == TextBudget.INSIDE else budget
    kept: dict[int, int] = {}

    by_object = sorted(allowed, key=lambda i: (-object_scores[i], i))
    anchors = by_object[: round(alpha * room / 5)]
    kept.update((i, A) for i in anchors)

    worth: dict[int, float] = {}
    for anchor in anchors:
        for j in slow_neighbours(anchor, n, width, buffer):
            if valid[j] and j not in kept:
                worth[j] = max(worth.get(j, object_scores[anchor]), object_scores[anchor])
    for j in sorted(worth, key=lambda j: (-worth[j], j)):
        if len(kept) < room:
            kept[j] = B

    for i in sorted(allowed, key=lambda i: (-deep_scores[i], i)):
        if len(kept) < room and i not in kept:
            kept[i] = R

    if similarity is not None:
        rest = sorted((i for i in allowed if i not in kept), key=lambda i: (-similarity[i], i))
        kept.update((i, T) for i in rest[:text])
    return sorted(kept.items())


# --- drawn views ----------------------------------------------------------------------------------


@dataclass
class Case:
    """One drawn view and policy."""

    object_scores: Floats
    deep_scores: Floats
    similarity: Floats | None
    width: int
    keep: int
    alpha: float
    beta: float
    buffer: BufferShape
    text_budget: TextBudget
    valid: npt.NDArray[np.bool_] | None

    @property
    def allowed(self) -> list[bool]:
        size = self.object_scores.size
        return [True] * size if self.valid is None else [bool(v) for v in self.valid]

    def hiprune(self, **changes: Any) -> Selection:
        options = {name: getattr(self, name) for name in ("width", "keep", "alpha", "buffer", "valid")}
        scores = {"object_scores": self.object_scores, "deep_scores": self.deep_scores}
        return hiprune(**(scores | options | changes))

    def plus_plus(self, **changes: Any) -> Selection:
        return hiprune_plus_plus(**(vars(self) | changes))

    def slow(self, *, similarity: Floats | None) -> list[tuple[int, int]]:
        return slow_hiprune_plus_plus(
            self.object_scores.tolist(),
            self.deep_scores.tolist(),
            None if similarity is None else similarity.tolist(),
            width=self.width,
            keep=self.keep,
            alpha=self.alpha,
            beta=self.beta,
            buffer=self.buffer,
            text_budget=self.text_budget,
            valid=self.allowed,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small views with many ties, scores above 1 and below 0, any shape, budget and padding."""
    height, width = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    n = height * width

    def scores() -> Floats:
        # Few distinct values make ties; a seeded draw is far quicker than n drawn floats.
        levels = draw(st.sampled_from([1, 2, 3, 7, 1000]))
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        drawn: Floats = (rng.integers(-levels, levels + 1, n) * np.float32(0.37)).astype(np.float32)
        return drawn

    share = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0, 1))
    valid = draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n).map(np.array))
    return Case(
        object_scores=scores(),
        deep_scores=scores(),
        similarity=draw(st.just(None)) if draw(st.integers(0, 4)) == 0 else scores(),
        width=width,
        keep=draw(st.integers(1, n + 3)),
        alpha=draw(share),
        beta=draw(share),
        buffer=draw(st.sampled_from(BufferShape)),
        text_budget=draw(st.sampled_from(TextBudget)),
        valid=valid,
    )


many = settings(max_examples=300, deadline=None)
some = settings(max_examples=100, deadline=None)


# --- parity with the authors ----------------------------------------------------------------------


def golden_cases() -> list[Any]:
    found = []
    for name in ("fixed_grid", "dynamic_grid"):
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = dict(file)
        for case in sorted({key.split("_")[0] for key in arrays}):
            parts = [arrays[f"{case}_{part}"] for part in ("params", "object", "deep", "mask")]
            found.append(pytest.param(*parts, id=f"{name}-{case}"))
    return found


@pytest.mark.parametrize(("params", "object_scores", "deep_scores", "mask"), golden_cases())
def test_the_authors_own_answers_are_reproduced_exactly(
    params: Floats, object_scores: Floats, deep_scores: Floats, mask: npt.NDArray[np.bool_]
) -> None:
    height, width, keep, alpha = (float(value) for value in params)
    assert object_scores.shape == deep_scores.shape == mask.shape == (len(mask), height * width)
    for view in range(len(mask)):
        kept = hiprune(object_scores[view], deep_scores[view], width=int(width), keep=int(keep), alpha=alpha)
        assert kept.indices.tolist() == np.flatnonzero(mask[view]).tolist()


def test_there_are_golden_cases_of_both_kinds_of_grid() -> None:
    assert len(golden_cases()) == 10


# --- against the slow reference -------------------------------------------------------------------


@many
@given(case=cases())
def test_hiprune_equals_the_slow_reference_in_indices_and_kinds(case: Case) -> None:
    assert pairs(case.hiprune()) == case.slow(similarity=None)


@many
@given(case=cases())
def test_hiprune_plus_plus_equals_the_slow_reference_in_indices_and_kinds(case: Case) -> None:
    assert pairs(case.plus_plus()) == case.slow(similarity=case.similarity)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("shape", list(BufferShape))
def test_a_full_size_view_with_ties_equals_the_slow_reference(shape: BufferShape, alpha: float) -> None:
    rng = np.random.default_rng(7)
    drawn = np.round(rng.random((3, 24 * 24)) * 40).astype(np.float32)  # 41 values for 576 tokens
    for keep in (64, 193, 575):
        case = Case(
            drawn[0],
            drawn[1],
            drawn[2],
            24,
            keep,
            alpha,
            0.1,
            shape,
            TextBudget.INSIDE,
            rng.random(576) < 0.9,
        )
        assert pairs(case.plus_plus()) == case.slow(similarity=case.similarity)


# --- properties -----------------------------------------------------------------------------------


def everyone(case: Case) -> list[tuple[int, Selection]]:
    """Each method's answer and the number of tokens that its rules promise."""
    n, room = case.object_scores.size, sum(case.allowed)
    budget = min(case.keep, room)
    text = 0 if case.similarity is None else round(case.beta * budget)
    return [
        (budget, case.hiprune()),
        (budget, case.plus_plus(text_budget=TextBudget.INSIDE)),
        (min(budget + text, room), case.plus_plus(text_budget=TextBudget.ADDITIVE)),
        (budget, random_tokens(n, keep=case.keep, seed=SEED, valid=case.valid)),
        (budget, strided(n, keep=case.keep, valid=case.valid)),
    ]


@many
@given(case=cases())
def test_kept_indices_are_exactly_k_ascending_unique_valid_and_of_the_stated_types(case: Case) -> None:
    for promised, kept in everyone(case):
        indices = kept.indices.tolist()
        assert len(indices) == promised
        assert indices == sorted(set(indices))
        assert all(0 <= i < case.object_scores.size and case.allowed[i] for i in indices)
        assert kept.indices.dtype == np.int64
        assert kept.kinds.dtype == np.int8
        assert kept.kinds.shape == kept.indices.shape
        assert set(kept.kinds.tolist()) <= set(TokenKind)


@some
@given(case=cases())
def test_the_same_call_gives_the_same_answer(case: Case) -> None:
    for (_, first), (_, second) in zip(everyone(case), everyone(case), strict=True):
        assert same(first, second)


@some
@given(case=cases(), powers=st.tuples(*[st.integers(-20, 20)] * 3))
def test_scaling_scores_by_a_power_of_two_changes_nothing(case: Case, powers: tuple[int, int, int]) -> None:
    by = [np.float32(2.0**power) for power in powers]
    scaled = {"object_scores": case.object_scores * by[0], "deep_scores": case.deep_scores * by[1]}
    assert same(case.hiprune(**scaled), case.hiprune())
    if case.similarity is not None:
        scaled["similarity"] = case.similarity * by[2]
    assert same(case.plus_plus(**scaled), case.plus_plus())


@some
@given(case=cases())
def test_arguments_are_not_changed_and_may_be_read_only(case: Case) -> None:
    arrays = [case.object_scores, case.deep_scores, case.similarity, case.valid]
    given_arrays = [array for array in arrays if array is not None]
    before = [array.tobytes() for array in given_arrays]
    for array in given_arrays:
        array.setflags(write=False)
    everyone(case)
    assert [array.tobytes() for array in given_arrays] == before


@some
@given(case=cases(), junk=st.sampled_from([-1e30, 0.0, 1e30]))
def test_scores_in_padding_have_no_say(case: Case, junk: float) -> None:
    padded = ~np.array(case.allowed)
    changed = {
        name: np.where(padded, np.float32(junk), scores)
        for name in ("object_scores", "deep_scores", "similarity")
        if (scores := getattr(case, name)) is not None
    }
    assert same(case.plus_plus(**changed), case.plus_plus())


@some
@given(case=cases())
def test_a_budget_above_the_view_answers_as_one_equal_to_it(case: Case) -> None:
    room = sum(case.allowed)
    if room:
        assert same(case.plus_plus(keep=room + 1000), case.plus_plus(keep=room))
        assert case.hiprune(keep=room).indices.tolist() == np.flatnonzero(case.allowed).tolist()


@some
@given(case=cases())
def test_no_question_and_beta_zero_are_plain_hiprune(case: Case) -> None:
    assert same(case.plus_plus(similarity=None), case.hiprune())
    assert same(case.plus_plus(beta=0.0), case.hiprune())


@some
@given(case=cases())
def test_additive_text_adds_to_hipruns_own_tokens_and_takes_none_away(case: Case) -> None:
    additive = case.plus_plus(text_budget=TextBudget.ADDITIVE)
    assert [pair for pair in pairs(additive) if pair[1] != T] == pairs(case.hiprune())


@some
@given(case=cases())
def test_kinds_mean_what_they_say(case: Case) -> None:
    """Anchors beat all others on object scores, registers what was left for them, text what was left last."""
    kept = pairs(case.plus_plus())
    left = {i for i, ok in enumerate(case.allowed) if ok}
    of = {kind: {i for i, k in kept if k == kind} for kind in (A, B, R, T)}
    for kind, scores in ((A, case.object_scores), (B, None), (R, case.deep_scores), (T, case.similarity)):
        left -= of[kind]
        if scores is not None and of[kind] and left:
            assert min(scores[i] for i in of[kind]) >= max(scores[i] for i in left)
    near = {j for a in of[A] for j in slow_neighbours(a, case.object_scores.size, case.width, case.buffer)}
    assert of[B] <= near
    if of[R]:  # there was room to spare, so no buffer was left out
        assert of[B] == {j for j in near - of[A] if case.allowed[j]}


@pytest.mark.parametrize("keep", range(1, 13))
@pytest.mark.parametrize(("height", "width"), [(1, 12), (12, 1), (3, 4), (1, 1)])
def test_one_row_one_column_and_one_token_are_views_like_others(height: int, width: int, keep: int) -> None:
    n = height * width
    rng = np.random.default_rng(keep)
    scores = rng.random((3, n)).astype(np.float32)
    for shape, alpha in itertools.product(BufferShape, (0.0, 0.3, 1.0)):
        case = Case(scores[0], scores[1], scores[2], width, keep, alpha, 0.2, shape, TextBudget.INSIDE, None)
        assert pairs(case.plus_plus()) == case.slow(similarity=case.similarity)
        assert case.hiprune().indices.size == min(n, keep)


# --- worked examples: ties, budgets, padding ------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    scores = np.random.default_rng(3).random((3, 576)).astype(np.float32)
    scores[0, ::24] += 1  # anchors at the left edge, where FLAT and GRID differ
    plain: dict[str, Any] = {"width": 24, "keep": 192}
    stated = plain | {"alpha": 0.1, "buffer": BufferShape.FLAT, "valid": None}
    assert same(hiprune(*scores[:2], **plain), hiprune(*scores[:2], **stated))
    stated |= {"beta": 0.1, "text_budget": TextBudget.INSIDE}
    assert same(hiprune_plus_plus(*scores, **plain), hiprune_plus_plus(*scores, **stated))


def test_ties_break_towards_the_lower_index_for_every_kind() -> None:
    level = np.ones(100, dtype=np.float32)
    kept = hiprune_plus_plus(level, level, level, width=10, keep=20, alpha=0.5, beta=0.2)
    # text 4, HiPrune 16, round(0.5 * 16 / 5) = 2 anchors: 0 and 1; their buffers: 2, 10, 11.
    assert pairs(kept) == [
        *((i, A) for i in (0, 1)),
        (2, B),
        *((i, R) for i in range(3, 10)),
        (10, B),
        (11, B),
        *((i, R) for i in range(12, 16)),
        *((i, T) for i in range(16, 20)),
    ]


def test_minus_zero_ties_with_zero() -> None:
    zeros = f32(-0.0, 0.0, -0.0, 0.0)
    assert hiprune(zeros, zeros, width=2, keep=2, alpha=0).indices.tolist() == [0, 1]
    assert hiprune(-zeros, -zeros, width=2, keep=2, alpha=0).indices.tolist() == [0, 1]


def test_scores_are_compared_in_float32_whatever_comes_in() -> None:
    nearly = np.array([1.0, 1.0 + 1e-12, 0.5, 0.5])  # apart in float64, equal in float32
    assert hiprune(nearly, nearly, width=2, keep=1).indices.tolist() == [0]
    half = np.array([1, 3, 2, 0], dtype=np.float16)
    assert hiprune(half, half, width=2, keep=2).indices.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("keep", "alpha", "anchors"),
    [(25, 0.1, 0), (75, 0.1, 2), (192, 0.1, 4), (128, 0.1, 3), (64, 0.1, 1), (192, 0.0, 0), (100, 1.0, 20)],
)
def test_anchors_number_alpha_k_over_five_with_halves_to_the_even(
    keep: int, alpha: float, anchors: int
) -> None:
    scores = np.random.default_rng(0).random((2, 576)).astype(np.float32)
    kinds = hiprune(*scores, width=24, keep=keep, alpha=alpha).kinds
    assert np.count_nonzero(kinds == A) == anchors


def test_when_buffers_exceed_k_those_of_the_best_anchors_stay() -> None:
    """K = 13, alpha 1: round(13 / 5) = 3 anchors with 4 buffers each, two too many."""
    object_scores = np.zeros(81, dtype=np.float32)  # 9 × 9
    object_scores[[10, 40, 70]] = 2, 3, 4
    kept = hiprune(object_scores, np.ones(81, dtype=np.float32), width=9, keep=13, alpha=1.0)
    # Anchor 10 scores least: of its buffers 1, 9, 11, 19 the two lowest indices are left.
    assert [i for i, kind in pairs(kept) if kind == A] == [10, 40, 70]
    assert [i for i, kind in pairs(kept) if kind == B] == [1, 9, 31, 39, 41, 49, 61, 69, 71, 79]


def test_a_buffer_of_two_anchors_counts_by_the_better_one() -> None:
    """K = 8, alpha 1: two anchors, and room for six of the seven buffers."""
    object_scores = np.zeros(25, dtype=np.float32)
    object_scores[[6, 8]] = 5, 9  # share buffer 7
    kept = hiprune(object_scores, object_scores, width=5, keep=8, alpha=1.0)
    # Anchor 8's 3, 7, 9, 13 first, then anchor 6's 1, 5, not 11.
    assert pairs(kept) == [(1, B), (3, B), (5, B), (6, A), (7, B), (8, A), (9, B), (13, B)]


def test_a_tiny_budget_with_alpha_one_is_still_exact() -> None:
    object_scores, deep_scores = f32(*range(9)), f32(*range(9, 0, -1))
    kept = [pairs(hiprune(object_scores, deep_scores, width=3, keep=k, alpha=1.0)) for k in (1, 2, 3)]
    assert kept == [
        [(0, R)],  # round(1 / 5) = 0 anchors
        [(0, R), (1, R)],  # round(2 / 5) = 0
        [(5, B), (7, B), (8, A)],  # round(3 / 5) = 1: token 8 and both its buffers
    ]


def test_padding_is_no_anchor_no_buffer_no_register_and_no_text() -> None:
    scores = np.zeros(25, dtype=np.float32)
    scores[[0, 12]] = 9, 5  # the best of all is padding
    valid = np.ones(25, dtype=np.bool_)
    valid[[0, 1, 7]] = False
    kept = hiprune_plus_plus(scores, scores, scores, width=5, keep=6, alpha=1.0, beta=0.2, valid=valid)
    # text 1, HiPrune 5: anchor 12, buffers 11, 13, 17 (7 is padding), register 2; text 3.
    assert pairs(kept) == [(2, R), (3, T), (11, B), (12, A), (13, B), (17, B)]


def test_fewer_valid_tokens_than_k_are_all_kept() -> None:
    valid = np.zeros(25, dtype=np.bool_)
    valid[[3, 8, 20]] = True
    scores = f32(*range(25))
    for kept in (
        hiprune(scores, scores, width=5, keep=9, valid=valid),
        hiprune_plus_plus(scores, scores, scores, width=5, keep=9, valid=valid),
        random_tokens(25, keep=9, seed=SEED, valid=valid),
        strided(25, keep=9, valid=valid),
    ):
        assert kept.indices.tolist() == [3, 8, 20]


def test_a_view_of_padding_alone_keeps_nothing() -> None:
    scores, valid = np.ones(4, dtype=np.float32), np.zeros(4, dtype=np.bool_)
    for kept in (
        hiprune_plus_plus(scores, scores, scores, width=2, keep=2, valid=valid),
        random_tokens(4, keep=2, seed=SEED, valid=valid),
        strided(4, keep=2, valid=valid),
    ):
        assert kept.indices.size == kept.kinds.size == 0
        assert kept.indices.dtype == np.int64


# --- HiPrune++ by hand ----------------------------------------------------------------------------

# A 4 × 5 view. Object scores peak at 6 and then 13; deep scores fall from 19 down to 0.
HAND_OBJECT = f32(0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0)
HAND_DEEP = f32(*range(20))
HAND_SIMILARITY = f32(
    *(-0.9, -0.1, -0.5, -0.2, -0.3),
    *(-0.4, 0.9, 0.8, -0.8, -0.7),
    *(-0.2, 0.7, -0.3, -0.6, -0.9),
    *(-0.5, -0.6, 0.5, 0.6, 0.7),
)
HAND: dict[str, Any] = {"width": 5, "keep": 10, "alpha": 0.5, "beta": 0.3}


def test_hiprune_plus_plus_by_hand_with_text_inside_the_budget() -> None:
    kept = hiprune_plus_plus(HAND_OBJECT, HAND_DEEP, HAND_SIMILARITY, **HAND)
    # text = round(0.3 * 10) = 3, HiPrune 7; anchors round(0.5 * 7 / 5) = round(0.7) = 1, not round(1.0) of K:
    # token 6; buffers 1, 5, 7, 11; registers 19, 18. Text: 6, 7, 11, 18 and 19 are taken, so the best are
    # 17 (0.5), 3 and 10 (-0.2 both): cosines below zero still count.
    assert pairs(kept) == [
        *[(1, B), (3, T), (5, B), (6, A), (7, B)],
        *[(10, T), (11, B), (17, T), (18, R), (19, R)],
    ]


def test_hiprune_plus_plus_by_hand_with_text_on_top_of_the_budget() -> None:
    kept = hiprune_plus_plus(HAND_OBJECT, HAND_DEEP, HAND_SIMILARITY, **HAND, text_budget=TextBudget.ADDITIVE)
    # HiPrune 10: anchor 6, buffers 1, 5, 7, 11, registers 19 to 15; text 3, 10 and then 4 (-0.3; before 12).
    assert pairs(kept) == [
        *[(1, B), (3, T), (4, T), (5, B), (6, A), (7, B), (10, T), (11, B)],
        *((i, R) for i in range(15, 20)),
    ]


@pytest.mark.parametrize(
    ("keep", "beta", "text"),
    [(192, 0.1, 19), (64, 0.1, 6), (5, 0.1, 0), (15, 0.1, 2), (25, 0.1, 2), (10, 1.0, 10), (1, 1.0, 1)],
)
def test_text_tokens_number_beta_k_with_halves_to_the_even(keep: int, beta: float, text: int) -> None:
    scores = np.random.default_rng(1).random((3, 576)).astype(np.float32)
    inside = hiprune_plus_plus(*scores, width=24, keep=keep, beta=beta)
    added = hiprune_plus_plus(*scores, width=24, keep=keep, beta=beta, text_budget=TextBudget.ADDITIVE)
    assert np.count_nonzero(inside.kinds == T) == np.count_nonzero(added.kinds == T) == text
    assert (inside.indices.size, added.indices.size) == (keep, keep + text)


def test_additive_text_stops_at_the_end_of_the_view() -> None:
    scores = f32(*range(10))
    kept = hiprune_plus_plus(
        scores, scores, scores, width=5, keep=8, beta=1.0, text_budget=TextBudget.ADDITIVE
    )
    assert kept.indices.tolist() == list(range(10))
    assert kept.kinds.tolist() == [T, T] + [R] * 8


def test_beta_one_keeps_the_tokens_most_like_the_question() -> None:
    kept = hiprune_plus_plus(HAND_OBJECT, HAND_DEEP, HAND_SIMILARITY, width=5, keep=4, beta=1.0)
    assert pairs(kept) == [(6, T), (7, T), (11, T), (19, T)]


# --- buffer shapes, worked on 5 × 5 ---------------------------------------------------------------

#  0  1  2  3  4
#  5  6  7  8  9
# 10 11 12 13 14
# 15 16 17 18 19
# 20 21 22 23 24
WORKED_BUFFERS: dict[BufferShape, dict[int, list[int]]] = {
    BufferShape.FLAT: {
        12: [7, 11, 13, 17],
        10: [5, 9, 11, 15],  # 9 ends the row above
        14: [9, 13, 15, 19],  # 15 begins the row below
        2: [0, 1, 3, 7],  # 2 - 5 clamps to token 0
        22: [17, 21, 23, 24],  # 22 + 5 clamps to token 24
        0: [1, 5],  # 0 - 1 and 0 - 5 clamp to the anchor itself
        24: [19, 23],
    },
    BufferShape.GRID: {
        12: [7, 11, 13, 17],
        10: [5, 11, 15],
        14: [9, 13, 19],
        2: [1, 3, 7],
        22: [17, 21, 23],
        0: [1, 5],
        24: [19, 23],
    },
    BufferShape.SQUARE: {
        12: [6, 7, 8, 11, 13, 16, 17, 18],
        10: [5, 6, 11, 15, 16],
        14: [8, 9, 13, 18, 19],
        2: [1, 3, 6, 7, 8],
        22: [16, 17, 18, 21, 23],
        0: [1, 5, 6],
        24: [18, 19, 23],
    },
    BufferShape.ROTATED_CROSS: {
        12: [6, 8, 16, 18],
        10: [6, 16],
        14: [8, 18],
        2: [6, 8],
        22: [16, 18],
        0: [6],
        24: [18],
    },
    BufferShape.ROW: {
        12: [11, 13],
        10: [11],
        14: [13],
        2: [1, 3],
        22: [21, 23],
        0: [1],
        24: [23],
    },
    BufferShape.COLUMN: {
        12: [7, 17],
        10: [5, 15],
        14: [9, 19],
        2: [7],
        22: [17],
        0: [5],
        24: [19],
    },
}


@pytest.mark.parametrize(
    ("shape", "anchor", "buffers"),
    [
        pytest.param(shape, anchor, buffers, id=f"{shape.name}-{anchor}")
        for shape, worked in WORKED_BUFFERS.items()
        for anchor, buffers in worked.items()
    ],
)
def test_each_shapes_buffers_on_a_worked_grid(shape: BufferShape, anchor: int, buffers: list[int]) -> None:
    object_scores = np.zeros(25, dtype=np.float32)
    object_scores[anchor] = 1
    # K = N = 25 and alpha 0.2: one anchor, room for every buffer, registers all the rest.
    kept = hiprune(object_scores, object_scores, width=5, keep=25, alpha=0.2, buffer=shape)
    assert np.flatnonzero(kept.kinds == A).tolist() == [anchor]
    assert np.flatnonzero(kept.kinds == B).tolist() == buffers
    assert np.count_nonzero(kept.kinds == R) == 24 - len(buffers)


def test_every_shape_is_worked_and_the_authors_is_the_default() -> None:
    assert set(WORKED_BUFFERS) == set(BufferShape)
    object_scores = np.zeros(25, dtype=np.float32)
    object_scores[10] = 1
    kept = hiprune(object_scores, object_scores, width=5, keep=25, alpha=0.2)
    assert np.flatnonzero(kept.kinds == B).tolist() == WORKED_BUFFERS[BufferShape.FLAT][10]


def test_an_anchor_beside_an_anchor_stays_an_anchor() -> None:
    object_scores = np.zeros(25, dtype=np.float32)
    object_scores[[12, 13]] = 2, 1
    kept = hiprune(object_scores, object_scores, width=5, keep=25, alpha=0.4)
    assert np.flatnonzero(kept.kinds == A).tolist() == [12, 13]
    assert np.flatnonzero(kept.kinds == B).tolist() == [7, 8, 11, 14, 17, 18]


def test_enum_numbers_are_the_wires() -> None:
    assert {kind.name: int(kind) for kind in TokenKind} == {
        "ANCHOR": 1,
        "BUFFER": 2,
        "REGISTER": 3,
        "TEXT": 4,
        "CONTROL": 5,
        "DOMINANT": 6,
        "DIVERSE": 7,
    }
    assert {shape.name: int(shape) for shape in BufferShape} == {
        "FLAT": 1,
        "GRID": 2,
        "SQUARE": 3,
        "ROTATED_CROSS": 4,
        "ROW": 5,
        "COLUMN": 6,
    }
    assert {budget.name: int(budget) for budget in TextBudget} == {"INSIDE": 1, "ADDITIVE": 2}


# --- ratios and controls --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "n", "keep"),
    [
        (1 / 3, 576, 192),
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.1, 25, 2),
        (0.001, 576, 1),
        (1.0, 576, 576),
        (1.0, 0, 1),
    ],
)
def test_a_ratio_rounds_halves_to_even_and_yields_at_least_one(ratio: float, n: int, keep: int) -> None:
    assert keep_of_ratio(ratio, n) == keep


@some
@given(ratio=st.floats(0, 1, exclude_min=True), n=st.integers(1, 20_000))
def test_a_ratio_never_yields_more_than_the_view(ratio: float, n: int) -> None:
    assert 1 <= keep_of_ratio(ratio, n) <= n


def test_everything_keeps_all_tokens_as_controls() -> None:
    assert pairs(everything(3)) == [(0, C), (1, C), (2, C)]


def test_random_tokens_are_pinned_to_their_seed() -> None:
    """Literal: the draw is part of the cache key's version, and must not follow a library's."""
    assert pairs(random_tokens(100, keep=8, seed=SEED)) == [(i, C) for i in PINNED]


def test_random_tokens_differ_with_the_seed_and_not_with_the_call() -> None:
    draws = [random_tokens(576, keep=64, seed=bytes([i]) * 32).indices.tolist() for i in range(8)]
    again = [random_tokens(576, keep=64, seed=bytes([i]) * 32).indices.tolist() for i in range(8)]
    assert draws == again
    assert len({tuple(draw) for draw in draws}) == 8


def test_random_tokens_are_spread_over_the_whole_view() -> None:
    counts = np.zeros(64)
    for i in range(500):
        counts[random_tokens(64, keep=16, seed=i.to_bytes(4, "big")).indices] += 1
    # 500 draws of 16 in 64: 125 a token, standard deviation 9.7; six of them either way, seeds fixed.
    assert counts.min() > 125 - 58
    assert counts.max() < 125 + 58


def test_a_larger_random_budget_keeps_a_superset() -> None:
    kept = [set(random_tokens(50, keep=k, seed=SEED).indices.tolist()) for k in range(1, 51)]
    assert all(small < large for small, large in itertools.pairwise(kept))


@pytest.mark.parametrize(
    ("n", "keep", "indices"),
    [
        (9, 1, [4]),
        (10, 1, [5]),
        (9, 3, [1, 4, 7]),
        (10, 4, [1, 3, 6, 8]),
        (5, 5, [0, 1, 2, 3, 4]),
        (1, 1, [0]),
        (5, 9, [0, 1, 2, 3, 4]),
    ],
)
def test_strided_tokens_by_hand(n: int, keep: int, indices: list[int]) -> None:
    assert pairs(strided(n, keep=keep)) == [(i, C) for i in indices]


@some
@given(n=st.integers(1, 600), data=st.data())
def test_strided_tokens_are_evenly_spaced_and_as_far_from_both_ends(n: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, n))
    indices = strided(n, keep=keep).indices
    steps = np.diff(indices)
    if keep > 1:
        assert {int(step) for step in steps} <= {n // keep, -(-n // keep)}
    assert abs(int(indices[0]) - (n - 1 - int(indices[-1]))) <= 1


def test_strided_tokens_are_spaced_over_the_valid_ones() -> None:
    valid = np.array([False, True] * 9)  # 1, 3, … 17
    assert strided(18, keep=3, valid=valid).indices.tolist() == [3, 9, 15]


# --- what is refused ------------------------------------------------------------------------------

ONES = np.ones(12, dtype=np.float32)


def good(**changes: Any) -> Selection:
    arguments: dict[str, Any] = {
        "object_scores": ONES,
        "deep_scores": ONES,
        "similarity": ONES,
        "width": 4,
        "keep": 3,
        "alpha": 0.1,
        "beta": 0.1,
    }
    return hiprune_plus_plus(**(arguments | changes))


def refused(call: Callable[[], object]) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["object_scores", "deep_scores", "similarity"])
def test_scores_that_are_not_finite_are_refused_by_name_and_place(name: str, bad: float) -> None:
    scores = ONES.copy()
    scores[7] = bad
    error = refused(lambda: good(**{name: scores}))
    assert error.field == name
    assert "7" in error.message
    assert str(bad) in error.message
    assert "finite" in error.message
    padded = np.arange(12) != 7
    assert refused(lambda: good(**{name: scores}, valid=padded)).field == name  # in padding too


def test_a_score_beyond_float32_is_refused() -> None:
    assert refused(lambda: good(deep_scores=np.full(12, 1e300))).field == "deep_scores"


@pytest.mark.parametrize(
    "scores",
    [
        np.ones((3, 4), dtype=np.float32),
        np.float32(1),
        np.ones(0, dtype=np.float32),
        np.ones(12, dtype=np.bool_),
        np.ones(12, dtype=np.complex64),
        np.array(["1"] * 12),
    ],
    ids=["two axes", "no axis", "empty", "bool", "complex", "text"],
)
@pytest.mark.parametrize("name", ["object_scores", "deep_scores", "similarity"])
def test_scores_of_the_wrong_shape_or_type_are_refused_by_name(name: str, scores: Any) -> None:
    assert refused(lambda: good(**{name: scores})).field == name


@pytest.mark.parametrize("name", ["deep_scores", "similarity"])
def test_scores_of_another_length_are_refused_with_both_lengths(name: str) -> None:
    error = refused(lambda: good(**{name: np.ones(11, dtype=np.float32)}))
    assert error.field == name
    assert "11" in error.message
    assert "12" in error.message


@pytest.mark.parametrize(
    ("name", "field", "bad", "bound"),
    [
        ("width", "grid_width", 5, "12"),
        ("width", "grid_width", 0, "1"),
        ("width", "grid_width", -4, "1"),
        ("width", "grid_width", 13, "12"),
        ("keep", "policy.keep_count", 0, "1"),
        ("keep", "policy.keep_count", -2, "1"),
        ("alpha", "policy.alpha", -0.01, "[0, 1]"),
        ("alpha", "policy.alpha", 1.01, "[0, 1]"),
        ("alpha", "policy.alpha", np.nan, "[0, 1]"),
        ("beta", "policy.beta", -0.01, "[0, 1]"),
        ("beta", "policy.beta", 1.01, "[0, 1]"),
        ("beta", "policy.beta", np.nan, "[0, 1]"),
        ("buffer", "policy.buffer", 0, "1 to 6"),
        ("text_budget", "policy.text_budget", 0, "1 or 2"),
        ("valid", "valid", np.ones(11, dtype=np.bool_), "(12,)"),
        ("valid", "valid", np.ones(12, dtype=np.int8), "bool"),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_field_value_and_bound(
    name: str, field: str, bad: Any, bound: str
) -> None:
    error = refused(lambda: good(**{name: bad}))
    assert error.field == field
    assert bound in error.message
    if name != "valid":
        assert str(bad) in error.message
    if name not in ("beta", "text_budget"):
        plain: dict[str, Any] = {"object_scores": ONES, "deep_scores": ONES, "width": 4, "keep": 3}
        assert refused(lambda: hiprune(**(plain | {name: bad}))).field == field
    if name in ("keep", "valid"):
        options = {"keep": 3} | {name: bad}
        assert refused(lambda: random_tokens(12, seed=SEED, **options)).field == field
        assert refused(lambda: strided(12, **options)).field == field


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.0001, np.nan, np.inf])
def test_a_ratio_outside_zero_to_one_is_refused(ratio: float) -> None:
    error = refused(lambda: keep_of_ratio(ratio, 576))
    assert error.field == "policy.keep_ratio"
    assert str(ratio) in error.message
    assert "(0, 1]" in error.message


def test_a_view_without_tokens_is_refused() -> None:
    calls: list[Callable[[], object]] = [
        lambda: everything(0),
        lambda: random_tokens(0, keep=1, seed=SEED),
        lambda: strided(0, keep=1),
        lambda: keep_of_ratio(0.5, -1),
    ]
    assert [refused(call).field for call in calls] == ["features"] * 4
