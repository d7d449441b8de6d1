"""What the soak's verdict rests on: its files, its thirds, and what counts as bad."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image

from benchmarks import soak
from hiprune.tenants import TenantsWatch
from tests.stacks import picture


def test_a_fresh_file_shows_the_same_picture_in_bytes_of_its_own():
    whole, draw = picture("scene00.png"), random.Random(0)
    one, other = soak.fresh_file(whole, draw), soak.fresh_file(whole, draw)
    assert len({whole, one, other}) == 3
    pixels = [Image.open(io.BytesIO(each)).convert("RGB").tobytes() for each in (whole, one, other)]
    assert pixels[0] == pixels[1] == pixels[2]


def test_memory_grows_by_the_last_third_over_the_middle_one():
    points = [(float(at), 500.0 if at < 30 else 100.0 if at < 60 else 110.0) for at in range(91)]
    found = soak.growth(points)
    assert (found["middle_mb"], found["last_mb"]) == (100, 110)
    assert found["growth"] == pytest.approx(0.1)


def test_percentiles_are_those_of_the_minute_when_a_request_was_due():
    rows = soak.by_minute([(59.9, 0.1), (60.0, 0.2), (61.0, 0.4)])
    assert [(row["minute"], row["p50_ms"], row["n"]) for row in rows] == [
        (0, pytest.approx(100), 1),
        (1, pytest.approx(300), 2),
    ]


@pytest.mark.parametrize(
    ("outcomes", "lost", "bad"),
    [
        ({"right": 5, "left": 2}, 0, 0),
        ({"right": 5, "wrong": 1}, 0, 1),
        ({"right": 5, "failed: Unavailable": 2, "hung": 1}, 1, 4),
    ],
)
def test_whatever_is_not_right_counts_against_the_claim(outcomes, lost, bad):
    memory = {"llm": {"middle_mb": 100.0, "last_mb": 106.0, "growth": 0.06}}
    targets = soak.targets_of({"outcomes": outcomes, "lost": lost, "memory": memory})
    assert targets[0]["measured"] == bad
    assert targets[0]["met"] is (bad == 0)
    assert targets[-1]["met"] is False  # memory that grows by 6 %


def test_the_tenants_of_the_run_are_let_in_by_their_keys(tmp_path):
    keys = soak.write_tenants(tmp_path / "tenants.yaml")
    tenants = TenantsWatch(tmp_path / "tenants.yaml")
    assert [tenants.of_key(key).name for key in keys] == [f"tenant-{number}" for number in range(4)]
