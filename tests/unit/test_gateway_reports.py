"""How the llm's report on what was pruned becomes JSON."""

from __future__ import annotations

import math
import struct

import pytest

from hiprune.errors import Internal
from hiprune.v1 import encoder_service_pb2, tensor_pb2
from hiprune.v1 import llm_service_pb2 as pb
from hiprune.v1 import pruner_service_pb2 as pruner
from services.gateway import reports
from services.gateway.reports import pruning_of


def vector(*values: float) -> tensor_pb2.Tensor:
    data = struct.pack(f"<{len(values)}f", *values)
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[len(values)], data=data)


def view(*object_scores: float, **fields: object) -> pruner.Selection:
    """A view of one row."""
    return pruner.Selection(
        kept_indices=[0],
        kinds=[pruner.TOKEN_KIND_ANCHOR],
        grid_height=1,
        grid_width=len(object_scores),
        scores=pruner.SelectionScores(object=vector(*object_scores)),
        **fields,
    )


def one(*views: pruner.Selection, scored: bool = True, **fields: object) -> dict[str, object]:
    """The only image of a report."""
    report = pb.PruningReport(media=[pb.MediaReport(views=views, **fields)])
    (image,) = pruning_of(report, detailed=True, scored=scored)["images"]
    return image


def test_scores_are_told_to_four_digits_and_only_those_that_are_there():
    (told,) = one(view(1234.56, -0.000123456, 0.0))["views"]
    assert told["scores"] == {"object": [1235.0, -0.0001235, 0.0]}


def test_without_being_asked_for_there_are_no_scores_and_no_word_of_them():
    (told,) = one(view(1.0, 2.0), scored=False)["views"]
    assert set(told) == {"grid_height", "grid_width", "kept_indices", "kinds"}


def test_a_report_holds_a_bounded_number_of_scores(monkeypatch):
    monkeypatch.setattr(reports, "MAX_SCORES", 5)
    told = one(view(1, 2, 3), view(1, 2, 3), view(1, 2))["views"]
    assert ["scores" in each for each in told] == [True, False, True]
    assert told[1]["scores_left_out"] == "more than 5 numbers in all"
    assert told[1]["kept_indices"] == [0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_json_cannot_tell_are_left_out_and_named(value):
    broken = view(1.0, value)
    assert "scores" not in one(broken)["views"][0]
    broken.scores.deep.CopyFrom(vector(1, 2))
    (told,) = one(broken)["views"]
    assert told["scores"] == {"deep": [1.0, 2.0]}
    assert told["scores_left_out"] == "not finite: object"


def test_a_kind_that_is_not_known_here_is_told_by_its_number():
    newer = view(1.0)
    newer.kinds[:] = [77]
    assert one(newer)["views"][0]["kinds"] == ["77"]


@pytest.mark.parametrize("tensor", [vector(1, 2, 3), tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F16)])
def test_scores_that_do_not_fit_the_grid_are_an_error_of_the_services(tensor):
    broken = view(1.0, 2.0)
    broken.scores.object.CopyFrom(tensor)
    with pytest.raises(Internal):
        one(broken)


def test_the_policy_is_told_in_the_words_it_is_asked_in():
    policy = pruner.PrunePolicy(
        method=pruner.METHOD_HIPRUNE_PLUS_PLUS,
        keep_ratio=0.25,
        alpha=0.0,
        object_layer=4,
        beta=0.1,
        buffer=pruner.BUFFER_SHAPE_ROTATED_CROSS,
        text_budget=pruner.TEXT_BUDGET_INSIDE,
    )
    summary = pruner.PruneSummary(policy=policy, deep_layer=7, text_model="clip")
    image = one(view(1.0), summary=summary)
    assert image["policy"] == {
        "method": "hiprune++",
        "keep": 0.25,
        "alpha": 0.0,
        "object_layer": 4,
        "deep_layer": 7,
        "beta": 0.1,
        "buffer": "rotated_cross",
        "text_budget": "inside",
    }
    assert image["text_model"] == "clip"


def test_tiles_are_told_with_their_place_and_the_part_that_is_no_padding():
    layout = encoder_service_pb2.MediaLayout(
        original_height=30, original_width=40, tile_rows=1, tile_columns=2
    )
    valid = encoder_service_pb2.ValidRegion(top=0, left=1, height=1, width=2)
    image = one(view(1.0, 2.0, 3.0), view(1.0, 2.0, 3.0, valid=valid), layout=layout)
    assert image["layout"] == {
        "original_height": 30,
        "original_width": 40,
        "tile_rows": 1,
        "tile_columns": 2,
    }
    base, tile = image["views"]
    assert "valid" not in base
    assert tile["valid"] == {"top": 0, "left": 1, "height": 1, "width": 2}
