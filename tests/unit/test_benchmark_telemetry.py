"""What the benchmark of telemetry rests on: who is asked in which order, and what its target tells apart."""

from __future__ import annotations

import grpc

from benchmarks import telemetry


class Asked:
    """A client of one of two stacks that remembers which picture came when."""

    def __init__(self, name: str, order: list[tuple[str, bytes]]) -> None:
        self.name, self.order = name, order

    async def ask(self, question, image, **options):
        self.order.append((self.name, image))


async def test_each_pair_is_one_picture_asked_of_both_in_turn():
    order: list[tuple[str, bytes]] = []
    told, silent = Asked("told", order), Asked("silent", order)
    times = await telemetry.measure_pairs(told, silent, count=4, warm_up=2, side=16)
    assert [len(each) for each in times] == [4, 4]
    pairs = [order[at : at + 2] for at in range(0, len(order), 2)]
    assert all(first[1] == second[1] for first, second in pairs)
    assert len({first[1] for first, _ in pairs}) == 6
    assert [first[0] for first, _ in pairs] == ["told", "silent"] * 3


def test_the_target_is_met_by_no_difference_and_missed_by_a_tenth():
    same = [1.0 + 0.001 * (number % 7 - 3) for number in range(500)]
    (met,) = telemetry.targets_of(telemetry.results_of(same, same[::-1]))
    (missed,) = telemetry.targets_of(telemetry.results_of([1.1 * each for each in same], same))
    assert (met["met"], missed["met"]) == (True, False)


def test_the_collector_takes_what_it_is_sent_and_counts_it():
    with telemetry.collector() as (address, counts):
        with grpc.insecure_channel(address) as channel:
            for place, service in enumerate(telemetry._EXPORTS):
                export = channel.unary_unary(f"/{service}/Export")
                assert export(b"x" * (place + 5), timeout=30, wait_for_ready=True) == b""
        assert list(counts) == [5, 6]
