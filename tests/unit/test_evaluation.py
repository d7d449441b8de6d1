"""What the evaluation's figures rest on: questions, intervals, variants and sums. Runs no service."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hiprune.families import facts_of
from hiprune.tenants import METHODS
from models.shapes import batches, summary
from models.shapes.architecture import vision_config
from models.shapes.evaluate import Found, Record
from models.shapes.exam import FIRST_SEED, sheet, token_owners
from models.shapes.intervals import Bootstrap, estimate, wilson
from models.shapes.questions import TYPES
from models.shapes.scenes import GRID, SIDE, patch_owners, scene
from models.shapes.variants import ABLATED, DRAWS, RATIOS, ablations, lifted, methods
from services.pruner.selection import TokenKind, hiprune

LLAVA = {"vision_config": vision_config().to_dict()}


# --- the exam --------------------------------------------------------------------------------------------


def test_a_sheet_follows_from_its_seed_and_asks_nothing_twice():
    assert sheet(0, 3, 2).image == sheet(0, 3, 2).image != sheet(0, 4, 2).image
    for number in range(8):
        texts = [question.text for question in sheet(0, number, 2).questions]
        assert len(texts) == len(set(texts)) > 4


def test_no_scene_of_the_exam_is_one_that_training_learns_from_or_looks_at():
    assert FIRST_SEED > batches.HELD_OUT
    seen = {scene(seed, number).things for seed in (1, batches.HELD_OUT) for number in range(100)}
    assert not seen & {scene(FIRST_SEED, number).things for number in range(100)}
    assert sheet(0, 3, 1).scene == scene(FIRST_SEED, 3)


def test_tokens_show_what_patches_show_and_any_grid_will_do():
    for number in range(10):
        owners = sheet(0, number, 1).owners
        assert (token_owners(owners, (GRID, GRID)) == patch_owners(owners).ravel()).all()
        coarse = token_owners(owners, (14, 14))
        assert coarse.shape == (196,)
        # a token of 13.7 pixels shows what lies around its middle, where that is one thing or none
        for token, shown in enumerate(coarse):
            row, column = (int((place + 0.5) * SIDE / 14) for place in divmod(token, 14))
            around = np.unique(owners[max(0, row - 7) : row + 8, max(0, column - 7) : column + 8])
            assert around.size > 1 or around[0] == shown


def test_a_picture_of_nothing_shows_nothing():
    assert not token_owners(np.zeros((SIDE, SIDE), np.int64), (14, 14)).any()


# --- intervals -------------------------------------------------------------------------------------------


def test_wilsons_interval_is_the_published_one():
    # Newcombe (1998), Statistics in Medicine 17, table I: 81 of 263 gives 0.2553 to 0.3662
    found = wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    whole = wilson(50, 50)
    assert (whole.value, whole.high) == (1, 1)
    assert 0.9 < whole.low < 1
    with pytest.raises(ValueError, match="0 questions"):
        wilson(0, 0)


def test_the_bootstrap_draws_scenes_and_not_questions():
    draw = np.random.default_rng(0)
    scenes = (draw.random((200, 1)) < 0.5).astype(float)
    asked, right = np.full((200, 1), 10.0), 10 * scenes  # all of a scene's ten questions alike
    found = estimate(Bootstrap(asked, 0).mean(right))
    assert found.value == pytest.approx(scenes.mean())
    # of 200 coins, not of 2000
    assert found.high - found.low == pytest.approx(4 * 0.5 / np.sqrt(200), rel=0.15)


def test_what_is_compared_with_itself_differs_by_nothing():
    asked = np.full((50, 2), 3.0)
    right = np.random.default_rng(0).integers(0, 4, (50, 2)).astype(float)
    bootstrap = Bootstrap(asked, 0)
    found = estimate(bootstrap.mean(right) - bootstrap.mean(right))
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_a_mean_counts_each_type_alike():
    asked, right = np.array([[1.0, 99.0]]), np.array([[1.0, 0.0]])
    assert Bootstrap(asked, 0).mean(right)[0] == 0.5


# --- variants --------------------------------------------------------------------------------------------


def test_every_method_of_the_service_is_compared_at_every_budget():
    found = {(variant.name, variant.budget) for variant in methods()}
    pruning = set(METHODS) - {"none"}
    assert found == {("none", "all"), *itertools.product(pruning, RATIOS)}
    assert sum(variant.name == "random" for variant in methods()) == DRAWS * len(RATIOS)


def test_every_ablation_has_one_default_and_no_variant_comes_twice():
    variants = ablations(facts_of({"model_type": "llava", **LLAVA}))
    groups = {variant.group for variant in variants}
    assert {"object layer", "alpha", "beta", "buffer", "parts", "attention from"} <= groups
    for group, budget in itertools.product(groups, ABLATED):
        here = [variant for variant in variants if (variant.group, variant.budget) == (group, budget)]
        assert sum(variant.served for variant in here) == 1, group
        assert len({variant.name for variant in here}) == len(here)


def test_anchors_without_buffers_are_the_anchors_and_then_registers():
    draw = np.random.default_rng(0)
    middle, deep = (draw.random(576).astype(np.float32) for _ in range(2))
    variant = next(each for each in ablations(facts_of({"model_type": "llava", **LLAVA})) if each.bare)
    keep = round(576 * RATIOS[variant.budget])
    full = hiprune(middle, deep, width=24, keep=keep)
    bare = hiprune(middle, lifted(middle, deep, variant), width=24, keep=keep, alpha=0.0)
    anchors = full.indices[full.kinds == TokenKind.ANCHOR]
    rest = [token for token in np.argsort(-deep, kind="stable") if token not in anchors]
    assert len(anchors) > 1
    assert set(bare.indices) == {*anchors, *rest[: keep - len(anchors)]}


# --- sums ------------------------------------------------------------------------------------------------


def record(number: int, said: list[list[str]]) -> Record:
    """A scene of two questions, with what each method's variant says."""
    found = [Found(said=each, tokens=10.0, foreground=0.5, covered=[True, False]) for each in said]
    scores = {1: np.arange(100, dtype=np.float32), 2: np.arange(100, dtype=np.float32)[::-1].copy()}
    owners = np.zeros(100, dtype=np.int64)
    owners[90:] = 1
    return Record(number, ["colour", "count"], ["red", "3"], found, (10, 10), owners, scores, {})


@pytest.fixture
def variants():
    return methods()


def test_accuracy_is_the_share_of_exact_answers_by_type_and_against_the_whole(variants):
    right, wrong = ["red", "3"], ["a red", "2"]
    records = [
        record(number, [right if variant.name in {"none", "hiprune"} else wrong for variant in variants])
        for number in range(4)
    ]
    rows = {(row["method"], row["budget"]): row for row in summary.accuracy(records, variants, 0)}
    assert rows["none", "all"]["mean"]["value"] == rows["hiprune", "1/9"]["mean"]["value"] == 1
    assert rows["hiprune", "1/9"]["of_unpruned"] == {"value": 1, "low": 1, "high": 1}
    assert rows["hiprune", "1/9"]["minus_random"]["value"] == 1
    assert rows["random", "1/3"]["draws"] == DRAWS
    assert set(rows["strided", "1/3"]["by_type"]) == {"colour", "count"} <= set(TYPES)
    assert rows["strided", "1/3"]["by_type"]["count"]["value"] == 0
    assert rows["strided", "1/3"]["counted"] == -1
    assert rows["none", "all"]["counted"] == 0
    assert rows["none", "all"]["covered"] == 0.5
    assert summary.plus_plus(records, variants, 0, "1/9").value == -1


def test_every_method_is_held_against_both_controls(variants):
    right, wrong = ["red", "3"], ["a red", "2"]
    says = {"none": right, "hiprune": right, "strided": right}
    records = [record(number, [says.get(each.name, wrong) for each in variants]) for number in range(3)]
    rows = {(row["method"], row["budget"]): row for row in summary.accuracy(records, variants, 0)}
    assert (
        rows["hiprune", "1/3"]["minus_random"]["value"],
        rows["hiprune", "1/3"]["minus_strided"]["value"],
    ) == (1, 0)
    assert rows["random", "1/3"]["minus_strided"]["value"] == -1
    assert "minus_random" not in rows["random", "1/3"]
    assert "minus_strided" not in rows["none", "all"]


def test_a_types_interval_is_of_scenes_and_not_of_questions(variants):
    draw = np.random.default_rng(0)
    records = []
    for number in range(40):
        coin = "red" if draw.random() < 0.5 else "blue"  # all ten answers of a scene alike
        one = record(number, [["red"] * 10 if each.name == "none" else [coin] * 10 for each in variants])
        one.types[:], one.truths[:] = ["colour"] * 10, ["red"] * 10
        for found in one.found:
            found.covered[:] = [True] * 10
        records.append(one)
    rows = {(row["method"], row["budget"]): row for row in summary.accuracy(records, variants, 0)}
    coins, all_right = (rows[key]["by_type"]["colour"] for key in (("random", "1/3"), ("none", "all")))
    assert coins["high"] - coins["low"] == pytest.approx(4 * 0.5 / np.sqrt(40), rel=0.2)
    assert all_right == wilson(40, 40).content()


def test_a_model_that_knows_nothing_has_no_share_of_its_accuracy(variants):
    records = [record(number, [["", ""] for _ in variants]) for number in range(3)]
    assert "of_unpruned" not in summary.accuracy(records, variants, 0)[1]


def test_layers_are_held_against_the_masks(variants):
    records = [record(number, [["", ""] for _ in variants]) for number in range(3)]
    first, second = summary.layers(records)
    assert first["iou"]["value"] == 1  # the things are the top tenth of layer 1, and the bottom of layer 2
    assert second["iou"]["value"] == 0
    assert first["lift"]["value"] > 1.8
    assert second["lift"]["value"] < 0.2
    assert "iou_cls" not in first
    proposed = summary.proposals(records, deep_layer=2, seed=0, pictures=2, times=5)
    assert proposed == {"1": 5}
