"""Claim: that another tenant has asked about a picture does not show in the time of one's own first question.

    python -m benchmarks.isolation [--pairs N]

The real encoder and pruner with the included model, and a Redis. Alice asks about half of the pictures, each
twice, so that they are surely cached. Then Bob asks about all of them, for the first time, in pairs: one that
Alice has asked about and one that nobody has, now the one first and now the other. What is measured is the
ratio of the two, with a 95 % interval of its median that supposes nothing of the distribution.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any, Final

from benchmarks import report
from benchmarks.cache import SETTLE_S, TIMEOUT_MS, TIMEOUT_S, photograph
from hiprune.auth import TENANT_HEADER
from hiprune.calls import connect
from hiprune.stack import Stack
from hiprune.v1 import media_pb2, pruner_service_pb2, pruner_service_pb2_grpc

CLAIM: Final = (
    "a tenant's first question about a picture takes as long whether another tenant has asked about it or "
    "nobody: the median ratio is within 0.97 to 1.03 and its 95 % interval holds 1"
)
ALICE, BOB = "alice", "bob"
SIDE: Final = 336
MISS: Final = pruner_service_pb2.CACHE_STATUS_MISS
PRUNED: Final = pruner_service_pb2.CACHE_STATUS_PRUNED_HIT


class Pruner:
    """The pruner, asked in a tenant's name as its peers do on a Unix socket."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def ask(self, tenant: str, image: bytes, expected: int) -> float:
        """Seconds of one PruneImage, whose answer must come from where it should."""
        request = pruner_service_pb2.PruneImageRequest(media=media_pb2.Media(image=image))
        begun = time.perf_counter()
        answer = await self._stub.PruneImage(request, timeout=TIMEOUT_S, metadata=((TENANT_HEADER, tenant),))
        taken = time.perf_counter() - begun
        if answer.cache != expected:
            raise SystemExit(f"{tenant}: cache status {answer.cache}, expected {expected}")
        return taken


async def measure_pairs(
    pruner: Pruner, count: int, warm_up: int, side: int = SIDE
) -> tuple[list[float], list[float]]:
    """Bob's seconds for pictures that Alice has asked about, and for those that nobody has."""
    total = count + warm_up
    pictures = [photograph(seed, side) for seed in range(2 * total)]
    known, unseen = pictures[:total], pictures[total:]
    for image in known:
        await pruner.ask(ALICE, image, MISS)
    await asyncio.sleep(SETTLE_S)
    for image in known:
        await pruner.ask(ALICE, image, PRUNED)
    times: tuple[list[float], list[float]] = ([], [])
    for number, pair in enumerate(zip(known, unseen, strict=True)):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            taken = await pruner.ask(BOB, pair[which], MISS)
            if number >= warm_up:
                times[which].append(taken)
    return times


def interval_of_median(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """An interval that holds the median with at least this confidence: order statistics (the sign test).

    The widest there is, where there are too few values for it.
    """
    ranked = sorted(values)
    n = len(ranked)
    below, cumulated = 0, 0.5**n  # the chance that at most `below` values lie under the median
    while below < (n - 1) // 2:
        following = cumulated + math.comb(n, below + 1) * 0.5**n
        if following > (1 - confidence) / 2:
            break
        below, cumulated = below + 1, following
    return ranked[below], ranked[n - 1 - below]


def results_of(known_s: Sequence[float], unseen_s: Sequence[float]) -> dict[str, Any]:
    """The figures of one run."""
    ratios = [a / b for a, b in zip(known_s, unseen_s, strict=True)]
    low, high = interval_of_median(ratios)
    return {
        "asked_by_another_ms": report.spread([1000 * each for each in known_s]),
        "asked_by_nobody_ms": report.spread([1000 * each for each in unseen_s]),
        "ratio": {**report.spread(ratios), "interval": [low, high]},
    }


def targets_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the claim is held to."""
    ratio = results["ratio"]
    return [
        report.target("distance of the median ratio from 1", abs(ratio["median"] - 1), 0.03),
        report.target("lower end of its 95 % interval", ratio["interval"][0], 1.0),
        report.target("upper end of its 95 % interval", ratio["interval"][1], 1.0, least=True),
    ]


async def measure(address: str, options: Any) -> dict[str, Any]:
    """All figures, of the pruner at an address."""
    async with connect(address) as channel:
        pruner = Pruner(pruner_service_pb2_grpc.PrunerServiceStub(channel))
        return results_of(*await measure_pairs(pruner, options.pairs, options.warm_up))


def main() -> None:
    """Measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=10)
    options = parser.parse_args()
    environ = {
        "HIPRUNE_ENCODER_DEVICE": options.device,
        "HIPRUNE_PRUNER_CACHE_TIMEOUT_MS": str(TIMEOUT_MS),
    }
    stack = Stack(environ=environ)
    try:
        stack.start_redis()
        for service in ("encoder", "pruner"):
            stack.start_service(service)
        for service in ("encoder", "pruner"):
            stack.wait_ready(service)
        results = asyncio.run(measure(stack.pruner_address, options))
    finally:
        stack.stop()
    name = report.name_on("isolation", options.device)
    targets = targets_of(results)
    low, high = results["ratio"]["interval"]
    report.table(
        "A first question about a picture",
        ("that was asked about by", "median ms"),
        [
            ("another tenant", report.short(results["asked_by_another_ms"]["median"])),
            ("nobody", report.short(results["asked_by_nobody_ms"]["median"])),
            ("ratio", f"{results['ratio']['median']:.3f} ({low:.3f} to {high:.3f})"),
        ],
    )
    report.print_targets(targets)
    settings = {"model": "the included one", "pairs": options.pairs, "warm_up": options.warm_up, "side": SIDE}
    print(report.write(name, CLAIM, settings, results, device=options.device, targets=targets))


if __name__ == "__main__":
    main()
