"""Claim: telling everything about every request costs at most a few percent of it.

    python -m benchmarks.telemetry [--pairs N] [--trace-ratio SHARE]

Two stacks of the included model side by side, without a cache, so that every request goes all the way: one is
silent, the other sends every trace and metric to a collector by OTLP, is scraped every 5 s and logs in JSON.
They are asked the same questions in pairs, now the one first and now the other. What is measured is the ratio
of the two, with a 95 % interval of its median that supposes nothing of the distribution. The collector is a
process that takes what comes and keeps nothing.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

import grpc

from benchmarks import report
from benchmarks.cache import photograph
from benchmarks.isolation import interval_of_median
from hiprune.client import Client
from hiprune.stack import SERVICES, Stack, free_port
from hiprune.v1 import llm_service_pb2

MOST: Final = 1.05
CLAIM: Final = (
    "with traces, metrics both sent and scraped, and JSON logs, AskImage takes at most 1.05 times what it "
    "takes without: the upper end of a 95 % interval of the median ratio"
)
QUESTION: Final = "which colour is the circle ?"
SIDE: Final = 336
SCRAPE_EVERY_S: Final = 5.0
_EXPORTS: Final = {
    "opentelemetry.proto.collector.trace.v1.TraceService": "spans",
    "opentelemetry.proto.collector.metrics.v1.MetricsService": "metrics",
}


def _collect(port: int, counts: Any) -> None:
    """A collector, until it is ended: answers every export, and counts the bytes."""

    def export(place: int) -> Any:
        def take(request: bytes, context: Any) -> bytes:
            counts[place] += len(request)
            return b""

        return grpc.unary_unary_rpc_method_handler(take)

    server = grpc.server(ThreadPoolExecutor(2))
    for place, service in enumerate(_EXPORTS):
        handler = grpc.method_handlers_generic_handler(service, {"Export": export(place)})
        server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


@contextmanager
def collector() -> Iterator[tuple[str, Any]]:
    """Address of a collector in a process of its own, and the bytes that it was sent, by kind."""
    context = multiprocessing.get_context("spawn")
    counts, port = context.Array("q", len(_EXPORTS)), free_port()
    process = context.Process(target=_collect, args=(port, counts), daemon=True)
    process.start()
    try:
        yield f"127.0.0.1:{port}", counts
    finally:
        process.terminate()
        process.join()


@contextmanager
def scraping(ports: Sequence[int]) -> Iterator[list[int]]:
    """Reads every service's page as Prometheus does; yields the pages' sizes in bytes."""
    ended, sizes = threading.Event(), []

    def scrape() -> None:
        while not ended.wait(SCRAPE_EVERY_S):
            for port in ports:
                asked = urllib.request.Request(
                    f"http://127.0.0.1:{port}/metrics", headers={"Accept": "application/openmetrics-text"}
                )
                with urllib.request.urlopen(asked, timeout=10) as answer:
                    sizes.append(len(answer.read()))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield sizes
    finally:
        ended.set()
        thread.join()


async def ask(client: Client, image: bytes) -> float:
    """Seconds of one AskImage, as its caller has them."""
    begun = time.perf_counter()
    await client.ask(QUESTION, image, sampling=llm_service_pb2.Sampling(max_tokens=8))
    return time.perf_counter() - begun


async def measure_pairs(
    told: Client, silent: Client, count: int, warm_up: int, side: int = SIDE
) -> tuple[list[float], list[float]]:
    """Seconds of the stack that tells everything, and of the silent one, of the same pictures in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(-warm_up, count):
        image = photograph(number + warm_up, side)
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            taken = await ask((told, silent)[which], image)
            if number >= 0:
                times[which].append(taken)
    return times


def results_of(told_s: Sequence[float], silent_s: Sequence[float]) -> dict[str, Any]:
    """The figures of one run."""
    ratios = [a / b for a, b in zip(told_s, silent_s, strict=True)]
    low, high = interval_of_median(ratios)
    return {
        "with_telemetry_ms": report.spread([1000 * each for each in told_s]),
        "silent_ms": report.spread([1000 * each for each in silent_s]),
        "ratio": {**report.spread(ratios), "interval": [low, high]},
    }


def targets_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the claim is held to."""
    return [
        report.target("upper end of the median ratio's 95 % interval", results["ratio"]["interval"][1], MOST)
    ]


async def measure(told: str, silent: str, options: Any) -> dict[str, Any]:
    """All figures, of the stacks at two addresses."""
    async with Client(told) as first, Client(silent) as second:
        return results_of(*await measure_pairs(first, second, options.pairs, options.warm_up))


def main() -> None:
    """Measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--trace-ratio", type=float, default=1.0, help="share of requests that are traced")
    options = parser.parse_args()
    common = {"HIPRUNE_ENCODER_DEVICE": options.device, "HIPRUNE_PRUNER_CACHE": "off"}
    ports = [free_port() for _ in SERVICES]
    with collector() as (address, sent):
        telling = {
            f"HIPRUNE_{service.upper()}_{name}": value
            for service, port in zip(SERVICES, ports, strict=True)
            for name, value in {
                "OTLP_ENDPOINT": address,
                "METRICS_LISTEN": f"127.0.0.1:{port}",
                "LOG_FORMAT": "json",
                "TRACE_RATIO": str(options.trace_ratio),
            }.items()
        }
        metrics_every = {"OTEL_METRIC_EXPORT_INTERVAL": "15000"}
        with (
            Stack(redis=False, environ={**common, **telling, **metrics_every}) as told,
            Stack(redis=False, environ=common) as silent,
            scraping(ports) as pages,
        ):
            results = asyncio.run(measure(told.address, silent.address, options))
        requests = options.pairs + options.warm_up
        results["sent_bytes_a_request"] = {
            kind: amount / requests for kind, amount in zip(_EXPORTS.values(), sent, strict=True)
        }
        results["page_bytes"] = max(pages, default=0)
    sampled = "" if options.trace_ratio == 1 else "_sampled"
    name = report.name_on(f"telemetry{sampled}", options.device)
    targets = targets_of(results)
    low, high = results["ratio"]["interval"]
    report.table(
        "AskImage, no cache",
        ("", "median ms"),
        [
            ("traces, metrics and JSON logs", report.short(results["with_telemetry_ms"]["median"])),
            ("silent", report.short(results["silent_ms"]["median"])),
            ("ratio", f"{results['ratio']['median']:.4f} ({low:.4f} to {high:.4f})"),
        ],
    )
    report.print_targets(targets)
    settings = {
        "model": "the included one",
        "pairs": options.pairs,
        "warm_up": options.warm_up,
        "side": SIDE,
        "trace_ratio": options.trace_ratio,
        "scraped_every_s": SCRAPE_EVERY_S,
        "metrics_sent_every_s": 15,
    }
    print(report.write(name, CLAIM, settings, results, device=options.device, targets=targets))


if __name__ == "__main__":
    main()
