"""Views and a policy in, pruned views out: what is kept, what is reported, and what does not fit refused."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from hiprune import tensors
from hiprune.errors import InvalidInput
from hiprune.v1 import encoder_service_pb2, pruner_service_pb2, tensor_pb2
from services.pruner.policy import Policy, resolve_layers
from services.pruner.pruning import NO_QUESTION, Guidance, check_views, plan, prune, similarities

View = encoder_service_pb2.View
METHODS = {name.removeprefix("METHOD_"): value for name, value in pruner_service_pb2.Method.items() if value}
A, B, R, T, C = (
    pruner_service_pb2.TOKEN_KIND_ANCHOR,
    pruner_service_pb2.TOKEN_KIND_BUFFER,
    pruner_service_pb2.TOKEN_KIND_REGISTER,
    pruner_service_pb2.TOKEN_KIND_TEXT,
    pruner_service_pb2.TOKEN_KIND_CONTROL,
)
D, V = pruner_service_pb2.TOKEN_KIND_DOMINANT, pruner_service_pb2.TOKEN_KIND_DIVERSE
SEED = bytes(32)


def f32(*values: float) -> tensor_pb2.Tensor:
    return tensors.to_proto(torch.tensor(values, dtype=torch.float32))


def view(height: int, width: int, layers: dict[int, list[float]] | None = None, **fields) -> View:
    attention = [
        encoder_service_pb2.LayerAttention(layer=layer, scores=f32(*scores))
        for layer, scores in (layers or {}).items()
    ]
    return View(grid_height=height, grid_width=width, attention=attention, **fields)


def policy(method: str = "HIPRUNE", object_layer: int = 1, deep_layer: int = 2, **fields) -> Policy:
    message = pruner_service_pb2.PrunePolicy(method=METHODS[method], **fields)
    return resolve_layers(message, object_layer=object_layer, deep_layer=deep_layer)


def kept(pruned, number: int = 0) -> list[tuple[int, int]]:
    selection = pruned.views[number].selection
    return list(zip(selection.kept_indices, selection.kinds, strict=True))


def rows(message: tensor_pb2.Tensor) -> torch.Tensor:
    return tensors.from_proto(message, field="x", shape=(None, None))


# 4 × 4: token 5 is the anchor, 1 4 6 9 its neighbours; deep scores like 15, then 14, …; text likes 3, then 0
OBJECT = [0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
DEEP = [float(i) for i in range(16)]
LIKENESS = [8, 0, 0, 9, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 6, 7]
FEATURES = torch.arange(32, dtype=torch.float16).reshape(16, 2)


def worked(**fields) -> View:
    return view(4, 4, {1: OBJECT, 2: DEEP}, features=tensors.to_proto(FEATURES), **fields)


def guided(*likeness: list[float]) -> Guidance:
    return Guidance([np.array(each, dtype=np.float32) for each in likeness], "my text model")


# --- the worked example ---------------------------------------------------------------------------


def test_the_worked_example_of_hiprune_plus_plus():
    """K = 10: round(0.2 × 10) = 2 by text; of the other 8, round(0.6 × 8 / 5) = 1 anchor, 4 buffers."""
    chosen = policy("HIPRUNE_PLUS_PLUS", keep_count=10, alpha=0.6, beta=0.2)
    pruned = prune([worked()], chosen, guided(LIKENESS), seed=SEED)
    assert kept(pruned) == [
        (0, T),
        (1, B),
        (3, T),
        (4, B),
        (5, A),
        (6, B),
        (9, B),
        (13, R),
        (14, R),
        (15, R),
    ]
    assert torch.equal(rows(pruned.views[0].features), FEATURES[[0, 1, 3, 4, 5, 6, 9, 13, 14, 15]])
    summary = pruned.summary
    assert (summary.tokens_before, summary.tokens_requested, summary.tokens_kept) == (16, 10, 10)
    assert (summary.deep_layer, summary.text_model, summary.text_note) == (2, "my text model", "")
    assert summary.policy == chosen.to_proto()


def test_the_same_example_without_a_question_is_hiprunes():
    for method, guidance in (("HIPRUNE_PLUS_PLUS", NO_QUESTION), ("HIPRUNE", guided(LIKENESS))):
        pruned = prune([worked()], policy(method, keep_count=8, alpha=0.6), guidance, seed=SEED)
        assert kept(pruned) == [(1, B), (4, B), (5, A), (6, B), (9, B), (13, R), (14, R), (15, R)]
    assert pruned.summary.text_model == pruned.summary.text_note == ""  # HIPRUNE asks no text


def test_a_missing_question_is_noted_where_it_matters():
    pruned = prune([worked()], policy("HIPRUNE_PLUS_PLUS", keep_count=8), NO_QUESTION, seed=SEED)
    assert pruned.summary.text_note == "no question"
    assert pruned.summary.text_model == ""
    assert T not in [kind for _, kind in kept(pruned)]


def test_an_additive_text_budget_adds_to_the_count():
    chosen = policy(
        "HIPRUNE_PLUS_PLUS",
        keep_count=8,
        alpha=0.6,
        beta=0.25,
        text_budget=pruner_service_pb2.TEXT_BUDGET_ADDITIVE,
    )
    pruned = prune([worked()], chosen, guided(LIKENESS), seed=SEED)
    assert (pruned.summary.tokens_requested, pruned.summary.tokens_kept) == (8, 10)
    assert [index for index, kind in kept(pruned) if kind == T] == [0, 3]


def test_the_layers_of_the_policy_are_the_ones_that_are_read():
    tokens = view(1, 4, {3: [9, 0, 0, 0], 5: [0, 9, 0, 0], 8: [0, 0, 9, 0], 9: [0, 0, 0, 9]})
    one = prune([tokens], policy(keep_count=1, alpha=1, object_layer=5, deep_layer=8), NO_QUESTION, seed=SEED)
    assert kept(one) == [(2, R)]  # round(1 / 5) = 0 anchors
    three = policy(
        keep_count=3, alpha=1, object_layer=3, deep_layer=9, buffer=pruner_service_pb2.BUFFER_SHAPE_ROW
    )
    assert kept(prune([tokens], three, NO_QUESTION, seed=SEED)) == [(0, A), (1, B), (3, R)]


@pytest.mark.parametrize("method", ["NONE", "RANDOM", "STRIDED"])
def test_a_control_needs_no_scores(method):
    pruned = prune([view(4, 4)], policy(method, keep_count=5), NO_QUESTION, seed=SEED)
    assert len(kept(pruned)) == (16 if method == "NONE" else 5)
    assert {kind for _, kind in kept(pruned)} == {C}
    assert (pruned.summary.deep_layer, pruned.summary.tokens_requested) == (0, len(kept(pruned)))


def test_random_is_the_seeds_and_differs_from_view_to_view():
    def drawn(seed: bytes) -> list[list[tuple[int, int]]]:
        pruned = prune([view(6, 6)] * 2, policy("RANDOM", keep_count=16), NO_QUESTION, seed=seed)
        return [kept(pruned, 0), kept(pruned, 1)]

    assert drawn(SEED) == drawn(SEED) != drawn(bytes(31) + b"\1")
    assert drawn(SEED)[0] != drawn(SEED)[1]


# --- what comes along -----------------------------------------------------------------------------


def test_without_features_there_are_indices_alone():
    pruned = prune([view(4, 4, {1: OBJECT, 2: DEEP})], policy(keep_count=4), NO_QUESTION, seed=SEED)
    assert len(kept(pruned)) == 4
    assert not pruned.views[0].HasField("features")
    assert not pruned.views[0].HasField("prefix_features")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kept_features_are_the_views_bit_for_bit(dtype):
    features = torch.randn(16, 3).to(dtype)
    tokens = view(4, 4, {1: OBJECT, 2: DEEP}, features=tensors.to_proto(features))
    for count in (1, 7, 16, 99):
        pruned = prune([tokens], policy(keep_count=count), NO_QUESTION, seed=SEED)
        indices = [index for index, _ in kept(pruned)]
        found = rows(pruned.views[0].features)
        assert found.dtype == dtype
        assert torch.equal(found, features[indices])


def test_grid_frame_and_layout_come_back():
    first, second = worked(frame=3), view(2, 3, {1: [0] * 6, 2: [0] * 6}, frame=4)
    pruned = prune([first, second], policy(keep_ratio=0.5), NO_QUESTION, seed=SEED)
    shown = [
        (each.selection.grid_height, each.selection.grid_width, each.selection.frame) for each in pruned.views
    ]
    assert shown == [(4, 4, 3), (2, 3, 4)]


def test_scores_are_there_when_they_were_asked_for_and_only_then():
    chosen = policy("HIPRUNE_PLUS_PLUS", keep_count=4, include_scores=True)
    scores = prune([worked()], chosen, guided(LIKENESS), seed=SEED).views[0].selection.scores
    for message, expected in ((scores.object, OBJECT), (scores.deep, DEEP), (scores.similarity, LIKENESS)):
        found = tensors.from_proto(message, field="x", shape=(16,), dtypes=(torch.float32,))
        assert found.tolist() == expected
    without = prune([worked()], policy(keep_count=4), NO_QUESTION, seed=SEED).views[0].selection
    assert not without.HasField("scores")
    plain = prune([worked()], policy(keep_count=4, include_scores=True), NO_QUESTION, seed=SEED)
    assert not plain.views[0].selection.scores.HasField("similarity")
    control = prune([view(2, 2)], policy("RANDOM", include_scores=True), NO_QUESTION, seed=SEED)
    assert control.views[0].selection.HasField("scores")
    assert not control.views[0].selection.scores.HasField("object")


def test_nothing_that_was_given_is_changed():
    tokens = worked()
    before = tokens.SerializeToString()
    likeness = guided(LIKENESS)
    prune([tokens], policy("HIPRUNE_PLUS_PLUS", include_scores=True), likeness, seed=SEED)
    assert tokens.SerializeToString() == before
    assert likeness.similarities[0].tolist() == LIKENESS


# --- views ----------------------------------------------------------------------------------------


def test_a_count_is_shared_out_over_the_views_and_a_ratio_taken_of_each():
    views = [view(4, 4), view(2, 4), view(1, 4)]
    by_count = prune(views, policy("STRIDED", keep_count=10), NO_QUESTION, seed=SEED)
    assert [len(kept(by_count, number)) for number in range(3)] == [3, 3, 3]
    assert (by_count.summary.tokens_requested, by_count.summary.tokens_kept) == (10, 9)
    by_ratio = prune(views, policy("STRIDED", keep_ratio=0.25), NO_QUESTION, seed=SEED)
    assert [len(kept(by_ratio, number)) for number in range(3)] == [4, 2, 1]
    with pytest.raises(InvalidInput, match="2 tokens for 3 views") as caught:
        prune(views, policy("STRIDED", keep_count=2), NO_QUESTION, seed=SEED)
    assert caught.value.field == "policy.keep_count"


def test_a_small_view_keeps_all_it_has_and_gives_nothing_away():
    pruned = prune([view(4, 4), view(1, 2)], policy("STRIDED", keep_count=10), NO_QUESTION, seed=SEED)
    assert [len(kept(pruned, number)) for number in range(2)] == [5, 2]


@pytest.mark.parametrize("method", METHODS)
def test_a_view_among_others_is_pruned_as_it_is_alone(method):
    one = worked()
    other = view(4, 4, {1: DEEP, 2: OBJECT}, features=tensors.to_proto(-FEATURES))
    chosen = policy(method, keep_ratio=0.5)
    together = prune([one, other], chosen, guided(LIKENESS, DEEP), seed=SEED)
    alone = prune([one], chosen, guided(LIKENESS), seed=SEED)
    assert kept(together, 0) == kept(alone, 0)
    assert together.views[0] == alone.views[0]


def region(top: int, left: int, height: int, width: int) -> encoder_service_pb2.ValidRegion:
    return encoder_service_pb2.ValidRegion(top=top, left=left, height=height, width=width)


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_never_kept_and_not_counted(method):
    tokens = worked(valid=region(1, 1, 2, 3))  # tokens 5 6 7 9 10 11
    check_views([tokens], max_tokens=100)
    for count in (1, 3, 6, 16):
        pruned = prune([tokens], policy(method, keep_count=count), guided(LIKENESS), seed=SEED)
        indices = [index for index, _ in kept(pruned)]
        assert set(indices) <= {5, 6, 7, 9, 10, 11}
        assert len(indices) == (6 if method == "NONE" else min(count, 6))
        assert pruned.summary.tokens_before == 6
        assert pruned.views[0].selection.valid == tokens.valid
        assert torch.equal(rows(pruned.views[0].features), FEATURES[indices])


@pytest.mark.parametrize("method", METHODS)
def test_a_view_that_is_all_padding_keeps_nothing(method):
    padded = worked(valid=region(0, 0, 0, 4))
    check_views([worked(), padded], max_tokens=100)
    pruned = prune([worked(), padded], policy(method, keep_count=6), guided(LIKENESS, LIKENESS), seed=SEED)
    assert kept(pruned, 1) == []
    assert list(pruned.views[1].features.shape) == [0, 2]
    assert pruned.summary.tokens_before == 16


def test_tokens_outside_the_grid_are_kept_and_counted():
    prefix = tensors.to_proto(torch.tensor([[70, 71]], dtype=torch.float16))
    views = [worked(prefix_features=prefix)] * 2
    check_views(views, max_tokens=100)
    pruned = prune(views, policy("STRIDED", keep_count=10), NO_QUESTION, seed=SEED)
    assert [len(kept(pruned, number)) for number in range(2)] == [4, 4]
    assert (pruned.summary.tokens_before, pruned.summary.tokens_kept) == (34, 10)
    assert rows(pruned.views[1].prefix_features).tolist() == [[70, 71]]


# --- peers ----------------------------------------------------------------------------------------


def from_cls(tokens: View, layer: int, scores: list[float]) -> View:
    entry = next(entry for entry in tokens.attention if entry.layer == layer)
    entry.cls_scores.CopyFrom(f32(*scores))
    return tokens


def test_visionzip_reads_attention_from_cls_where_there_is_a_cls_and_the_deep_scores_where_not():
    tokens = from_cls(worked(), 2, LIKENESS)  # highest: 3, 0, then 5 and 15 alike
    with_cls = dataclasses.replace(policy("VISIONZIP", keep_count=3, include_scores=True), has_cls=True)
    pruned = prune([tokens], with_cls, NO_QUESTION, seed=SEED)
    assert kept(pruned) == [(0, D), (3, D), (5, D)]
    shown = pruned.views[0].selection.scores
    assert tensors.from_proto(shown.cls, field="x", shape=(16,)).tolist() == LIKENESS
    assert [field.name for field, _ in shown.ListFields()] == ["cls"]
    without = prune([tokens], policy("VISIONZIP", keep_count=3), NO_QUESTION, seed=SEED)
    assert kept(without) == [(13, D), (14, D), (15, D)]
    assert pruned.summary.deep_layer == without.summary.deep_layer == 2


def test_attention_from_cls_that_is_missing_in_one_view_is_named():
    views = [from_cls(worked(), 2, LIKENESS), worked()]
    chosen = dataclasses.replace(policy("VISIONZIP", keep_count=6), has_cls=True)
    with pytest.raises(InvalidInput) as caught:
        prune(views, chosen, NO_QUESTION, seed=SEED)
    assert (caught.value.field, caught.value.reason) == (
        "views[1].attention[1].cls_scores",
        "MISSING_FIELD",
    )


def test_divprune_reads_features_and_no_score():
    # directions of (2i, 2i + 1): 0 is (0, 1), far from all; then the last, nearest to (1, 1)
    tokens = view(4, 4, features=tensors.to_proto(FEATURES))
    pruned = prune([tokens], policy("DIVPRUNE", keep_count=2), NO_QUESTION, seed=SEED)
    assert kept(pruned) == [(0, V), (15, V)]
    assert pruned.summary.deep_layer == 0


def test_what_divprune_keeps_is_known_before_it_is_chosen():
    padded = {"valid": {"top": 1, "height": 2, "left": 0, "width": 3}}
    prefix = tensors.to_proto(torch.zeros(1, 2, dtype=torch.float16))
    views = [worked(prefix_features=prefix), worked(prefix_features=prefix, **padded)]
    for count in (4, 5, 7, 30):
        asked = policy("DIVPRUNE", keep_count=count)
        summary, planned = prune(views, asked, NO_QUESTION, seed=SEED).summary, plan(views, asked)
        assert (planned.kept, sum(planned.counts)) == (summary.tokens_kept, summary.tokens_before)


def test_divprune_refuses_what_would_take_minutes_before_it_reads_a_number():
    height, width = 500, 524
    rows = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F16, shape=[height * width, 1])
    huge = view(height, width, features=rows)
    with pytest.raises(InvalidInput, match="compares every two of 262000 tokens") as caught:
        prune([huge], policy("DIVPRUNE", keep_count=100), NO_QUESTION, seed=SEED)
    assert (caught.value.field, caught.value.reason) == ("policy.method", "LIMIT_EXCEEDED")


# --- scores that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "field", "text"),
    [
        ({}, "views[0].attention", r"holds layers \[\], expected layer 1"),
        ({2: DEEP}, "views[0].attention", r"holds layers \[2\], expected layer 1"),
        ({1: OBJECT, 3: DEEP}, "views[0].attention", "expected layer 2"),
        (
            {1: OBJECT[:-1], 2: DEEP},
            "views[0].attention[0].scores.shape",
            r"shape is \(15\), expected \(16\)",
        ),
        ({1: OBJECT, 2: [math.nan] * 16}, "views[0].attention[1].scores", "element 0 is nan"),
        ({1: [0, math.inf, *OBJECT[2:]], 2: DEEP}, "views[0].attention[0].scores", "element 1 is inf"),
    ],
)
def test_scores_that_are_missing_or_unfit_are_named(layers, field, text):
    with pytest.raises(InvalidInput, match=text) as caught:
        prune([view(4, 4, layers)], policy(keep_count=4), NO_QUESTION, seed=SEED)
    assert caught.value.field == field


def test_a_layer_missing_in_a_later_view_is_named_there():
    with pytest.raises(InvalidInput) as caught:
        prune([worked(), view(4, 4, {1: OBJECT})], policy(), NO_QUESTION, seed=SEED)
    assert (caught.value.field, caught.value.reason) == ("views[1].attention", "MISSING_FIELD")


def test_scores_of_another_dtype_are_refused():
    scores = tensors.to_proto(torch.zeros(16, dtype=torch.float16))
    tokens = view(4, 4, {2: DEEP})
    tokens.attention.add(layer=1, scores=scores)
    with pytest.raises(InvalidInput, match="DATA_TYPE_F16, expected DATA_TYPE_F32") as caught:
        prune([tokens], policy(), NO_QUESTION, seed=SEED)
    assert caught.value.field == "views[0].attention[1].scores.dtype"


# --- views that do not fit ------------------------------------------------------------------------

HALF = tensors.to_proto(FEATURES)


@pytest.mark.parametrize(
    ("views", "field", "text"),
    [
        ([], "views", "none, expected at least 1"),
        ([view(0, 4)], "views[0].grid_height", r"0 is outside \[1, 100\]"),
        ([view(4, -4)], "views[0].grid_width", "-4 is outside"),
        ([view(1, 101)], "views[0].grid_width", "101 is outside"),
        ([view(2**31 - 1, 2**31 - 1)], "views[0].grid_height", "is outside"),
        ([view(20, 20)], "views[0].grid_height", "makes 400 tokens, expected at most 100"),
        ([view(8, 8), view(8, 8)], "views[1].grid_height", "makes 128 tokens, expected at most 100 over all"),
        ([view(4, 5, features=HALF)], "views[0].features.shape", r"shape is \(16, 2\), expected \(20, \*\)"),
        ([view(4, 4), view(4, 5, aligned=HALF)], "views[1].aligned.shape", r"expected \(20, \*\)"),
        ([view(4, 4, features=f32(*OBJECT))], "views[0].features.shape", "rank is 1"),
        ([view(4, 4, features=tensor_pb2.Tensor())], "views[0].features.dtype", "UNSPECIFIED"),
        ([view(4, 4, prefix_features=f32(1, 2))], "views[0].prefix_features.shape", "rank is 1"),
        (
            [worked(prefix_features=tensors.to_proto(torch.zeros(1, 3)))],
            "views[0].prefix_features.shape",
            r"shape is \(1, 3\), expected \(\*, 2\)",
        ),
        (
            [worked(), worked(prefix_features=tensors.to_proto(torch.zeros(1, 2)))],
            "views[1].prefix_features",
            r"1 tokens outside the grid, expected 0 as in views\[0\]",
        ),
        ([worked(), view(2, 2, {0: OBJECT})], "views[1].attention[0].layer", "0, expected at least 1"),
        ([view(2, 2, {7: OBJECT, -3: OBJECT})], "views[0].attention[1].layer", "-3, expected"),
        ([view(4, 4, valid=region(-1, 0, 1, 1))], "views[0].valid.top", r"-1 is outside \[0, 4\]"),
        ([view(4, 4, valid=region(0, 5, 1, 0))], "views[0].valid.left", "5 is outside"),
        ([view(4, 4, valid=region(1, 0, 4, 1))], "views[0].valid.height", r"4 is outside \[0, 3\]"),
        ([view(4, 4, valid=region(0, 0, 1, -1))], "views[0].valid.width", "-1 is outside"),
    ],
    ids=lambda value: value if isinstance(value, str) and re.fullmatch(r"views.*", value) else "",
)
def test_a_view_that_does_not_fit_is_named_with_value_and_bound(views, field, text):
    with pytest.raises(InvalidInput, match=text) as caught:
        check_views(views, max_tokens=100)
    assert caught.value.field == field


def test_rows_of_nothing_outside_the_grid_count_for_nothing():
    endless = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F16, shape=[2**60, 0], data=b"")
    tokens = view(4, 4, prefix_features=endless)
    check_views([tokens], max_tokens=100)
    pruned = prune([tokens], policy("STRIDED", keep_count=4), NO_QUESTION, seed=SEED)
    assert (pruned.summary.tokens_before, pruned.summary.tokens_kept) == (16, 4)


# --- similarity -----------------------------------------------------------------------------------


def test_similarity_is_the_cosine_of_each_token_in_any_dtype():
    vector = torch.randn(8)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        aligned = torch.randn(16, 8).to(dtype)
        (found,) = similarities([view(4, 4, aligned=tensors.to_proto(aligned))], vector)
        expected = torch.nn.functional.cosine_similarity(aligned.float(), vector[None], dim=1)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), atol=tolerance)


def test_length_changes_no_similarity_and_a_zero_has_none():
    aligned = torch.tensor([[3.0, 0.0], [0.0, 1e-3], [0.0, 0.0], [-7.0, 0.0]])
    tokens = [view(2, 2, aligned=tensors.to_proto(aligned))]
    for length in (1e-3, 1.0, 1e3):
        (found,) = similarities(tokens, torch.tensor([length, 0.0]))
        np.testing.assert_allclose(found, [1, 0, 0, -1], atol=1e-6)


def test_similarity_with_features_needs_no_aligned_tokens():
    (found,) = similarities([worked()], torch.tensor([0.0, 1.0]), space="features")
    assert found.shape == (16,)


@pytest.mark.parametrize(
    ("tokens", "field", "text"),
    [
        (
            view(2, 2, aligned=tensors.to_proto(torch.zeros(4, 3))),
            "text_vector",
            "2 channels, expected 3 as in",
        ),
        (view(2, 2), "views[0].aligned.dtype", "UNSPECIFIED"),
        (
            view(2, 2, aligned=tensors.to_proto(torch.full((4, 2), math.nan))),
            "views[0].aligned",
            "element 0 is nan",
        ),
    ],
)
def test_a_similarity_that_cannot_be_taken_is_refused(tokens, field, text):
    with pytest.raises(InvalidInput, match=text) as caught:
        similarities([tokens], torch.ones(2))
    assert caught.value.field == field
