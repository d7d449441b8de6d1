"""What the cache benchmark's figures rest on: entries are read, answers come from where they should."""

from __future__ import annotations

import pytest

from benchmarks import cache
from hiprune.v1 import pruner_service_pb2


class Stub:
    """A pruner that answers from wherever a test says, and remembers what it was asked."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.asked: list[tuple[bytes, str]] = []

    async def PruneImage(self, request, **options):
        self.asked.append((request.media.image, request.question))
        return pruner_service_pb2.PruneImageResponse(cache=self.statuses.pop(0))


async def test_entries_are_read_in_turn_with_as_many_plain_bytes(redis_server):
    found = await cache.measure_entries(redis_server, 4, 1, kept=8, channels=16)
    assert found["bytes"] > 8 * 16 * 2
    assert found["get_ms"]["n"] == found["plain_get_ms"]["n"] == 4
    assert found["ratio"]["median"] > 0


async def test_two_things_on_a_loop_run_in_turn_and_swap_who_is_first():
    ran = []

    async def run(name: str) -> None:
        ran.append(name)

    times = await cache.pairs_of(lambda: run("A"), lambda: run("B"), count=3, warm_up=1)
    assert "".join(ran) == "BA" + "ABBAAB"
    assert [len(side) for side in times] == [3, 3]


async def test_every_picture_is_a_miss_then_an_encoded_and_a_pruned_hit(monkeypatch):
    monkeypatch.setattr(cache, "SETTLE_S", 0.0)
    stub = Stub(*[cache.MISS, cache.ENCODED, cache.PRUNED] * 2)
    found = await cache.measure_requests(cache.Pruner(stub), count=1, warm_up=1)
    assert found["miss_ms"]["n"] == 1
    assert stub.asked[0][0] == stub.asked[1][0] == stub.asked[2][0] != stub.asked[3][0]
    assert stub.asked[0][1] != stub.asked[1][1] == stub.asked[2][1]


async def test_an_answer_from_elsewhere_ends_the_benchmark():
    with pytest.raises(SystemExit, match="expected"):
        await cache.Pruner(Stub(cache.ENCODED)).ask(b"image", "question", cache.MISS)


async def test_questions_with_a_cache_are_averaged_and_those_without_stand_for_all():
    cached = Stub(*[cache.MISS] * 3, *[cache.MISS, *[cache.ENCODED] * 29])
    uncached = Stub(*[cache.MISS] * 4)
    rows = await cache.measure_questions(cache.Pruner(cached), cache.Pruner(uncached), (1, 30))
    assert [(row["questions"], row["pictures"]) for row in rows] == [(1, 3), (30, 1)]
    assert len({question for _, question in cached.asked[3:]}) == 30
    assert len({image for image, _ in cached.asked}) == 4
    assert rows[0]["uncached_ms"] == rows[1]["uncached_ms"] > 0


def test_the_claim_is_held_to_its_three_numbers():
    def results(pruned: float, encoded: float, entry: float) -> dict:
        return {
            "requests": {
                "miss_over_pruned_hit": {"median": pruned},
                "miss_over_encoded_hit": {"median": encoded},
            },
            "entries": {"ratio": {"median": entry}},
        }

    assert [each["met"] for each in cache.targets_of(results(50, 10, 3))] == [True, True, True]
    assert [each["met"] for each in cache.targets_of(results(49, 9, 3.1))] == [False, False, False]
