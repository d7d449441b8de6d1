"""The choice of an object layer from scores alone: each figure is what its definition says."""

from __future__ import annotations

import numpy as np
import pytest

from hiprune import layer_choice
from hiprune.layer_choice import Profile, View

GRID = (12, 18)
N = GRID[0] * GRID[1]
TOP = round(0.1 * N)


def scores_of(places) -> np.ndarray:
    """Scores (N,) whose top tenth is `places`."""
    made = np.random.default_rng(0).uniform(0.1, 1.0, N).astype(np.float32)
    made[list(places)] += 10
    return made


def block(row: int, column: int) -> list[int]:
    """A tenth of the tokens as near to a square as it gets."""
    return [(row + place // 5) * GRID[1] + column + place % 5 for place in range(TOP)]


def scattered(seed: int) -> list[int]:
    return list(np.random.default_rng(seed).choice(N, TOP, replace=False))


def views(*layers) -> list[View]:
    """One view for each picture: `layers` are, for every layer, the places by picture."""
    return [
        View({order: scores_of(places) for order, places in enumerate(each, start=1)}, GRID)
        for each in zip(*layers, strict=True)
    ]


MOVING = [block(0, 0), block(7, 12), block(3, 6), block(0, 12)]
FIXED = [block(4, 4)] * 4
NOISE = [scattered(seed) for seed in range(4)]


def test_the_top_tenth_goes_to_the_lower_index_where_scores_are_equal():
    assert np.flatnonzero(layer_choice.top_tokens(np.ones(20, np.float32))).tolist() == [0, 1]
    assert np.flatnonzero(layer_choice.top_tokens(scores_of(block(2, 3)))).tolist() == sorted(block(2, 3))


def test_distance_is_the_mean_over_all_pairs_by_that_of_the_whole_grid():
    def slow(places) -> float:
        points = np.array([divmod(place, GRID[1]) for place in places], float)
        apart = np.hypot(*(points[:, None] - points).transpose(2, 0, 1))
        return apart.sum() / (len(points) * (len(points) - 1))

    for places in (NOISE, MOVING, FIXED):
        (found,) = layer_choice.profiles(views(places))
        assert found.distance == pytest.approx(np.mean([slow(each) for each in places]) / slow(range(N)))


def test_clumps_are_neighbours_and_habit_is_the_same_places():
    moving, fixed, noise = layer_choice.profiles(views(MOVING, FIXED, NOISE))
    assert noise.clumps == pytest.approx(0.1, abs=0.06)
    assert moving.clumps > 0.6
    assert fixed.habit == pytest.approx(1.0)
    assert moving.habit < 0.2
    assert fixed.merit == pytest.approx(0.0)


def test_what_clumps_elsewhere_in_every_picture_is_proposed():
    found = layer_choice.profiles(views(NOISE, FIXED, MOVING, NOISE))
    assert layer_choice.suggest(found, deep_layer=4) == 3


def test_the_deep_layer_is_not_proposed_unless_it_is_alone():
    found = layer_choice.profiles(views(NOISE, MOVING))
    assert layer_choice.suggest(found, deep_layer=2) == 1
    assert layer_choice.suggest(found[:1], deep_layer=1) == 1


def test_of_equal_layers_the_lower_one_is_proposed():
    same = Profile(layer=2, distance=1, clumps=0.5, habit=0.2, attention=0.2)
    other = Profile(layer=1, distance=1, clumps=0.5, habit=0.2, attention=0.2)
    assert layer_choice.suggest([same, other], deep_layer=9) == 1


def test_pictures_of_different_shapes_are_compared():
    wide = View({1: scores_of(block(0, 0))}, GRID)
    tall = View({1: scores_of(range(TOP))}, (GRID[1], GRID[0]))
    (found,) = layer_choice.profiles([wide, tall])
    assert 0 < found.habit < 1


def test_one_picture_is_too_few_and_layers_must_agree():
    with pytest.raises(ValueError, match="1 views, expected at least 2"):
        layer_choice.profiles(views([MOVING[0]]))
    with pytest.raises(ValueError, match="different layers"):
        layer_choice.profiles([*views(MOVING), *views(MOVING, FIXED)])
