"""What the benchmark of isolation rests on: who asks what in which order, and the interval's meaning."""

from __future__ import annotations

import random
import statistics

import pytest

from benchmarks import isolation
from hiprune.v1 import pruner_service_pb2


class Stub:
    """A pruner with a cache for each tenant, or one for all, that remembers who asked for what."""

    def __init__(self, *, shared: bool = False) -> None:
        self.shared = shared
        self.asked: list[tuple[str, bytes]] = []

    async def PruneImage(self, request, *, metadata, **options):
        who = (metadata[0][1], request.media.image)
        held = (
            {image for _, image in self.asked} if self.shared else {i for t, i in self.asked if t == who[0]}
        )
        self.asked.append(who)
        status = isolation.PRUNED if who[1] in held else isolation.MISS
        return pruner_service_pb2.PruneImageResponse(cache=status)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(isolation, "SETTLE_S", 0.0)


async def test_each_pair_is_one_picture_that_another_tenant_has_asked_about_and_one_that_nobody_has():
    stub = Stub()
    known, unseen = await isolation.measure_pairs(isolation.Pruner(stub), count=4, warm_up=1, side=16)
    assert len(known) == len(unseen) == 4
    alices = {image for tenant, image in stub.asked if tenant == "alice"}
    bobs = [image for tenant, image in stub.asked if tenant == "bob"]
    assert len(alices) == 5
    assert len(set(bobs)) == len(bobs) == 10
    order = [image in alices for image in bobs]
    assert order == [True, False, False, True] * 2 + [True, False]


async def test_a_cache_that_tenants_share_ends_the_benchmark():
    with pytest.raises(SystemExit, match="bob: cache status"):
        await isolation.measure_pairs(isolation.Pruner(Stub(shared=True)), count=2, warm_up=0, side=16)


def test_the_interval_holds_the_median_as_often_as_it_says():
    draw = random.Random(7)
    held = 0
    for _ in range(400):
        low, high = isolation.interval_of_median([draw.expovariate(1.0) for _ in range(41)])
        held += low <= 0.6931 <= high  # ln 2, the median of an exponential distribution
    assert 0.93 <= held / 400 <= 1.0
    values = [draw.random() for _ in range(1000)]
    low, high = isolation.interval_of_median(values)
    assert low <= statistics.median(values) <= high
    assert high - low < 0.1


def test_targets_are_met_by_no_difference_and_missed_by_a_cache_that_is_shared():
    same = [1.0 + 0.001 * (number % 7 - 3) for number in range(100)]
    met = [each["met"] for each in isolation.targets_of(isolation.results_of(same, same[::-1]))]
    assert met == [True, True, True]
    faster = [0.5 * each for each in same]
    met = [each["met"] for each in isolation.targets_of(isolation.results_of(faster, same))]
    assert met == [False, True, False]
