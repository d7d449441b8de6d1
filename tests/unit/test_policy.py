"""The policy: its defaults, every field that can be wrong, its budget, and the bytes that identify it."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hiprune.budgets import keep_of_ratio
from hiprune.checkpoints import open_checkpoint
from hiprune.errors import InvalidInput
from hiprune.families import Facts
from hiprune.v1 import pruner_service_pb2 as pb
from services.pruner.policy import Policy, resolve, resolve_layers
from services.pruner.selection import BufferShape, TextBudget, TokenKind

LLAVA = Facts(
    family="llava",
    layers=24,
    object_layer=9,
    deep_layer=23,
    hidden_size=1024,
    grid=(24, 24),
    vision_keys=re.compile("^vision_tower[.]"),
    paired_text_model="",
    fixed_tokens=576,
)
NUMBER = 576


def of(**fields) -> Policy:
    return resolve(pb.PrunePolicy(**fields), LLAVA)


# --- defaults -------------------------------------------------------------------------------------


def test_an_empty_policy_is_the_papers():
    policy = of()
    assert policy.method == pb.METHOD_HIPRUNE
    assert (policy.keep_count, policy.keep_ratio) == (None, 1 / 3)
    assert (policy.alpha, policy.beta, policy.object_layer, policy.deep_layer) == (0.1, 0.1, 9, 23)
    assert (policy.buffer, policy.text_budget) == (BufferShape.FLAT, TextBudget.INSIDE)
    assert not policy.include_scores
    assert policy.keep_per_view([576]) == [192]


def test_what_is_set_is_taken_a_zero_too():
    policy = of(alpha=0.0, beta=0.0, object_layer=1, keep_ratio=1.0, include_scores=True)
    assert (policy.alpha, policy.beta, policy.object_layer, policy.keep_ratio) == (0, 0, 1, 1)
    assert policy.include_scores
    policy = of(keep_count=7, buffer=pb.BUFFER_SHAPE_COLUMN, text_budget=pb.TEXT_BUDGET_ADDITIVE)
    assert (policy.keep_count, policy.keep_ratio) == (7, None)
    assert (policy.buffer, policy.text_budget) == (BufferShape.COLUMN, TextBudget.ADDITIVE)


def test_the_wires_enums_and_the_selections_agree():
    for wire, own, prefix in (
        (pb.BufferShape, BufferShape, "BUFFER_SHAPE_"),
        (pb.TextBudget, TextBudget, "TEXT_BUDGET_"),
        (pb.TokenKind, TokenKind, "TOKEN_KIND_"),
    ):
        named = {name.removeprefix(prefix): value for name, value in wire.items() if value}
        assert named == {each.name: int(each) for each in own}


def test_the_report_fills_in_every_default():
    reported = of().to_proto()
    assert reported == pb.PrunePolicy(
        method=pb.METHOD_HIPRUNE,
        keep_ratio=1 / 3,
        alpha=0.1,
        object_layer=9,
        beta=0.1,
        buffer=pb.BUFFER_SHAPE_FLAT,
        text_budget=pb.TEXT_BUDGET_INSIDE,
    )
    for field in ("alpha", "object_layer", "beta"):
        assert reported.HasField(field)


@pytest.mark.parametrize(
    "fields", [{}, {"keep_count": 5}, {"method": pb.METHOD_NONE}, {"alpha": 0.0}], ids=str
)
def test_the_report_asks_for_the_same_again(fields):
    policy = of(**fields)
    assert resolve(policy.to_proto(), LLAVA) == policy


# --- what can be wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({"method": 99}, "method", "99 is unknown, expected 1 to 7"),
        ({"method": -1}, "method", "-1 is unknown"),
        ({"buffer": 7}, "buffer", "7 is unknown, expected 1 to 6"),
        ({"buffer": -7}, "buffer", "-7 is unknown"),
        ({"text_budget": 3}, "text_budget", "3 is unknown, expected 1 to 2"),
        ({"keep_count": 0}, "keep_count", "0 tokens; expected at least 1"),
        ({"keep_count": -5}, "keep_count", "-5 tokens"),
        ({"keep_ratio": 0.0}, "keep_ratio", r"0.0 is outside \(0, 1\]"),
        ({"keep_ratio": -0.5}, "keep_ratio", "-0.5 is outside"),
        ({"keep_ratio": 1.0000001}, "keep_ratio", "1.0000001 is outside"),
        ({"keep_ratio": math.nan}, "keep_ratio", "nan is outside"),
        ({"keep_ratio": math.inf}, "keep_ratio", "inf is outside"),
        ({"alpha": -0.1}, "alpha", r"-0.1 is outside \[0, 1\]"),
        ({"alpha": 2.0}, "alpha", "2.0 is outside"),
        ({"alpha": math.nan}, "alpha", "nan is outside"),
        ({"beta": 1.1}, "beta", "1.1 is outside"),
        ({"beta": -math.inf}, "beta", "-inf is outside"),
        ({"object_layer": 0}, "object_layer", r"0 is outside \[1, 23\]"),
        ({"object_layer": -9}, "object_layer", "-9 is outside"),
        ({"object_layer": 24}, "object_layer", "24 is outside"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_bound(fields, field, text):
    with pytest.raises(InvalidInput, match=text) as caught:
        of(**fields)
    assert (caught.value.field, caught.value.reason) == (f"policy.{field}", "INVALID_FIELD")


# --- the budget -----------------------------------------------------------------------------------


def test_a_count_is_shared_out_evenly_over_the_views():
    assert of(keep_count=64).keep_per_view([576]) == [64]
    assert of(keep_count=640).keep_per_view([576] * 5) == [128] * 5
    assert of(keep_count=8).keep_per_view([100] * 3) == [2] * 3
    assert of(keep_count=3).keep_per_view([100] * 3) == [1] * 3


def test_fewer_than_one_token_a_view_is_refused():
    with pytest.raises(InvalidInput, match="2 tokens for 3 views; expected at least 1 a view") as caught:
        of(keep_count=2).keep_per_view([100] * 3)
    assert caught.value.field == "policy.keep_count"


def test_a_count_at_or_above_all_tokens_keeps_all_and_is_reported_as_asked():
    for count in (576, 577, 2**31 - 1):
        assert of(keep_count=count).keep_per_view([576]) == [576]
        assert of(keep_count=count).requested([576]) == count
    assert of(keep_count=300).keep_per_view([100, 200]) == [100, 200]


def test_a_ratio_of_a_strangers_views_is_taken_of_each_and_one_of_a_media_item_of_all():
    fields = pb.PrunePolicy(keep_ratio=0.25)
    each = resolve_layers(fields, object_layer=1, deep_layer=1, ratio_of="view")
    assert each.keep_per_view([100, 40, 1]) == [25, 10, 1]
    assert each.requested([100, 40, 1]) == 36
    media = resolve_layers(fields, object_layer=1, deep_layer=1, ratio_of="media")
    assert media.keep_per_view([100, 100, 40]) == [20] * 3  # 60 of 240, shared out
    assert media.requested([100, 100, 40]) == 60


def test_a_ratio_never_asks_for_less_than_one_token_a_view():
    for ratio_of in ("view", "media"):
        policy = resolve_layers(
            pb.PrunePolicy(keep_ratio=1e-9), object_layer=1, deep_layer=1, ratio_of=ratio_of
        )
        assert policy.keep_per_view([50] * 4) == [1] * 4


def test_none_keeps_all_whatever_the_budget():
    for fields in ({}, {"keep_count": 1}, {"keep_ratio": 0.1}):
        policy = of(method=pb.METHOD_NONE, **fields)
        assert policy.keep_per_view([100, 200]) == [100, 200]
        assert policy.requested([100, 200]) == 300


def test_tokens_outside_the_grid_count_and_leave_room_for_one_of_the_grid():
    policy = of(keep_count=64)
    assert policy.keep_per_view([257] * 8, prefix=1) == [8] * 8
    assert of(keep_count=16).keep_per_view([257] * 8, prefix=1) == [2] * 8
    with pytest.raises(InvalidInput, match="15 tokens for 8 views; expected at least 2 a view"):
        of(keep_count=15).keep_per_view([257] * 8, prefix=1)


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=9),
    st.one_of(st.integers(1, 5000), st.floats(0, 1, exclude_min=True)),
    st.sampled_from(["media", "view"]),
)
def test_a_budget_is_at_least_one_a_view_and_never_more_than_was_asked(counts, budget, ratio_of):
    name = "keep_count" if isinstance(budget, int) else "keep_ratio"
    policy = resolve_layers(pb.PrunePolicy(**{name: budget}), object_layer=1, deep_layer=1, ratio_of=ratio_of)
    assume(name == "keep_ratio" or budget >= len(counts))
    shares = policy.keep_per_view(counts)
    assert len(shares) == len(counts)
    assert min(shares) >= 1
    assert sum(shares) <= max(policy.requested(counts), len(counts))


# --- identity -------------------------------------------------------------------------------------

METHODS = [value for value in pb.Method.values() if value]
POLICIES = st.builds(
    pb.PrunePolicy,
    method=st.sampled_from(METHODS),
    alpha=st.sampled_from([0.0, 0.1, 0.5]),
    beta=st.sampled_from([0.0, 0.1, 0.5]),
    object_layer=st.sampled_from([1, 9]),
    buffer=st.sampled_from([1, 2]),
    text_budget=st.sampled_from([1, 2]),
    include_scores=st.booleans(),
)


@st.composite
def budgeted(draw) -> Policy:
    message = draw(POLICIES)
    name, value = draw(st.sampled_from([("keep_ratio", 1 / 3), ("keep_count", 192), ("keep_count", 64)]))
    setattr(message, name, value)
    return resolve(message, LLAVA)


def meaning(policy: Policy, tokens: int | None) -> tuple[object, ...]:
    """What of a policy can change an answer, by the words of the protos."""
    found: list[object] = [policy.method, policy.include_scores]
    if policy.method != pb.METHOD_NONE:
        count, ratio = policy.keep_count, policy.keep_ratio
        if tokens is not None and ratio is not None:
            count, ratio = keep_of_ratio(ratio, tokens), None
        found += [count, ratio]
    if policy.method in (pb.METHOD_HIPRUNE, pb.METHOD_HIPRUNE_PLUS_PLUS):
        found += [policy.object_layer, policy.deep_layer, policy.alpha, policy.buffer]
    if policy.method == pb.METHOD_VISIONZIP:
        found += [policy.deep_layer, policy.has_cls]
    if policy.method == pb.METHOD_HIPRUNE_PLUS_PLUS:
        found += [policy.beta, policy.text_budget]
    return tuple(found)


@given(budgeted(), budgeted(), st.sampled_from([None, NUMBER]))
def test_canonical_bytes_are_equal_exactly_when_the_answer_is(one, other, tokens):
    same = meaning(one, tokens) == meaning(other, tokens)
    assert (one.canonical(tokens) == other.canonical(tokens)) == same


@given(budgeted(), st.data())
def test_every_field_that_a_method_reads_changes_the_bytes_and_no_other_does(policy, data):
    field = data.draw(st.sampled_from([field.name for field in dataclasses.fields(Policy)]))
    value = {
        "method": pb.METHOD_STRIDED,
        "keep_count": 5,
        "keep_ratio": 0.9,
        "alpha": 0.77,
        "beta": 0.77,
        "object_layer": 2,
        "deep_layer": 5,
        "buffer": BufferShape.ROW,
        "text_budget": TextBudget.ADDITIVE,
        "include_scores": not policy.include_scores,
        "ratio_of": "view",
        "has_cls": not policy.has_cls,
    }[field]
    assume(getattr(policy, field) is not None)  # of the two budgets, the one that is set
    changed = dataclasses.replace(policy, **{field: value})
    same = meaning(changed, None) == meaning(policy, None)
    assert (changed.canonical(None) == policy.canonical(None)) == same


def test_a_ratio_and_its_count_share_an_entry_on_a_fixed_grid_only():
    ratio, count = of(keep_ratio=1 / 3), of(keep_count=192)
    assert ratio.canonical(NUMBER) == count.canonical(NUMBER)
    assert ratio.canonical(None) != count.canonical(None)
    assert of(keep_ratio=65 / 196).canonical(196) == of(keep_count=65).canonical(196)
    assert of(keep_ratio=0.3).canonical(NUMBER) != count.canonical(NUMBER)


def test_a_share_is_told_from_its_neighbour_in_the_last_bit():
    assert of(alpha=0.1).canonical(None) != of(alpha=math.nextafter(0.1, 1)).canonical(None)


def test_the_embedded_models_defaults_come_from_its_own_facts(model):
    policy = resolve(pb.PrunePolicy(), open_checkpoint(str(model)).facts)
    assert (policy.object_layer, policy.deep_layer) == (9, 11)
    assert policy.keep_per_view([576]) == [192]
