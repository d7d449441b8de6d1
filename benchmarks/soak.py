"""Claim: half an hour at 80 % of capacity leaves memory flat, and no request wrong, failed or lost.

    python -m benchmarks.soak [--minutes 30] [--share 0.8]

The stack on the embedded model with a real Redis of 128 MB, which is full within minutes, and four tenants.
A closed loop finds the capacity of this machine, load generator included; then requests come at random
moments (Poisson) at a share of it: pictures seen before with questions asked before, the same under a policy
of their own, pictures nobody has seen, and clients who leave once they know what was kept. The answer to each
is known from the quiet stack before.

Memory is each process's proportional set size (Linux), every five seconds. Flat: its mean over the last third
is within 5 % of that over the middle third.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import struct
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import checkpoints, plots, report
from hiprune.client import Client, question_message
from hiprune.errors import HipruneError
from hiprune.redis_clients import close_client, open_client
from hiprune.stack import Stack
from hiprune.tenants import new_key
from hiprune.v1 import llm_service_pb2, pruner_service_pb2

CLAIM: Final = (
    "half an hour at 80 % of capacity leaves the memory of every process flat, and every request ends with "
    "the right answer"
)
TENANTS: Final = 4
REDIS_BYTES: Final = "128mb"
SAMPLE_EVERY_S: Final = 5.0
DEADLINE_S: Final = 30.0
FLAT: Final = 0.05
SHARES: Final = {"seen": 0.50, "own policy": 0.20, "fresh": 0.28, "leaves": 0.02}
"""Which requests come how often."""
METHODS: Final = (
    pruner_service_pb2.METHOD_HIPRUNE,
    pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS,
    pruner_service_pb2.METHOD_NONE,
)
KEEP, ALPHA = 192, 0.1
"""A third of the included model's 576 tokens. 4 of 192 are anchors for every alpha from 0.092 to 0.117."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the answer of the quiet stack."""

    image: bytes
    text: str
    method: pruner_service_pb2.Method.ValueType
    answer: str = ""

    def request(self, *, image: bytes = b"", alpha: float = ALPHA) -> llm_service_pb2.AskImageRequest:
        """As a request, perhaps about another file of the same picture."""
        policy = pruner_service_pb2.PrunePolicy(method=self.method, alpha=alpha, keep_count=KEEP)
        message = question_message(self.text, [image or self.image])
        return llm_service_pb2.AskImageRequest(messages=[message], policy=policy)


@dataclass
class Tally:
    """What became of the requests, and when."""

    outcomes: Counter[str] = field(default_factory=Counter)
    caches: Counter[str] = field(default_factory=Counter)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    """Seconds from the beginning to when a request was due, and from there to its answer."""


def fresh_file(png: bytes, draw: random.Random) -> bytes:
    """The same picture in a file that nobody has seen: a comment of random bytes after the header chunk."""
    comment = b"tEXtseed\0" + draw.randbytes(12).hex().encode()
    chunk = struct.pack(">I", len(comment) - 4) + comment + struct.pack(">I", zlib.crc32(comment))
    header = 8 + 25  # the signature and IHDR
    return png[:header] + chunk + png[header:]


async def ask(client: Client, request: llm_service_pb2.AskImageRequest) -> tuple[str, str]:
    """The answer, and what the cache had."""
    text, cache = "", ""
    async for event in client.ask_stream(request):
        match event.WhichOneof("event"):
            case "report":
                cache = pruner_service_pb2.CacheStatus.Name(event.report.media[0].cache)
            case "delta":
                text += event.delta.text
    return text, cache


async def leave(client: Client, request: llm_service_pb2.AskImageRequest) -> None:
    """Goes once the report has come."""
    async with aclosing(client.ask_stream(request)) as events:  # type: ignore[type-var]
        await anext(events)


async def known_questions(client: Client, count: int) -> list[Question]:
    """Questions on the sample pictures, and their answers while nothing else runs."""
    samples = json.loads((checkpoints.SAMPLES / "questions.json").read_text("utf-8"))[:count]
    found = []
    for sample in report.track(samples, "answers of the quiet stack"):
        image = (checkpoints.SAMPLES / sample["image"]).read_bytes()
        for method in METHODS:
            asked = Question(image, sample["question"], method)
            answer, _ = await ask(client, asked.request())
            found.append(Question(image, asked.text, method, answer))
    return found


class Visitors:
    """Sends requests of all kinds, and says what became of them."""

    def __init__(self, clients: Sequence[Client], questions: Sequence[Question], seed: int) -> None:
        self._clients = clients
        self._questions = questions
        self._draw = random.Random(seed)

    async def visit(self, tally: Tally, begun_s: float, due_s: float) -> None:
        """One request, from the moment it was due to its end."""
        draw = self._draw
        kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
        question, client = draw.choice(self._questions), draw.choice(self._clients)
        # an alpha of its own makes a policy of its own, and keeps the same tokens
        alpha = draw.uniform(0.095, 0.105) if kind == "own policy" else ALPHA
        request = question.request(
            image=fresh_file(question.image, draw) if kind in {"fresh", "leaves"} else b"", alpha=alpha
        )
        try:
            async with asyncio.timeout(2 * DEADLINE_S):
                if kind == "leaves":
                    await leave(client, request)
                    tally.outcomes["left"] += 1
                    return
                answer, cache = await ask(client, request)
        except TimeoutError:
            tally.outcomes["hung"] += 1
        except HipruneError as error:
            tally.outcomes[f"failed: {type(error).__name__}"] += 1
        else:
            tally.outcomes["right" if answer == question.answer else "wrong"] += 1
            tally.caches[cache] += 1
            tally.latencies.append((due_s - begun_s, time.perf_counter() - due_s))


async def capacity(visitors: Visitors, clients: int, seconds: float) -> float:
    """Requests a second of `clients` who each come again when they are served."""
    tally = Tally()
    begun = time.perf_counter()
    with report.progress("capacity, a closed loop", int(seconds)) as step:

        async def visitor() -> None:
            while time.perf_counter() < begun + seconds:
                await visitors.visit(tally, begun, time.perf_counter())

        async def clock() -> None:
            for _ in range(int(seconds)):
                await asyncio.sleep(1)
                step()

        await asyncio.gather(clock(), *(visitor() for _ in range(clients)))
    if set(tally.outcomes) - {"right", "left"}:
        raise SystemExit(f"the closed loop: {dict(tally.outcomes)}")
    return sum(tally.outcomes.values()) / (time.perf_counter() - begun)


async def soak(
    visitors: Visitors, rate: float, seconds: float, processes: Mapping[str, int]
) -> tuple[Tally, int, dict[str, list[tuple[float, float]]]]:
    """Requests at `rate` a second: what became of them, how many were sent, and memory in MB over time."""
    tally, memory = Tally(), {name: list[tuple[float, float]]() for name in processes}
    draw, sent, running = random.Random(1), 0, set[asyncio.Task[None]]()
    begun = due = time.perf_counter()
    with report.progress(f"{rate:.1f} requests/s", int(seconds / SAMPLE_EVERY_S)) as step:

        async def watch() -> None:
            while True:
                now = time.perf_counter() - begun
                for name, pid in processes.items():
                    memory[name].append((now, proportional_set_mb(pid)))
                step()
                await asyncio.sleep(SAMPLE_EVERY_S)

        watching = asyncio.create_task(watch())
        while (due := due + draw.expovariate(rate)) < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(visitors.visit(tally, begun, due))
            running.add(task)
            task.add_done_callback(running.discard)
            sent += 1
        await asyncio.gather(*running)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    return tally, sent, memory


def proportional_set_mb(pid: int) -> float:
    """A process's memory, pages that it shares counted in part: proc(5), smaps_rollup."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no Pss of process {pid}")


def growth(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Means over the middle and the last third of the time, MB, and the share by which the last is above."""
    end = points[-1][0]
    middle = statistics.fmean(mb for at, mb in points if end / 3 <= at < 2 * end / 3)
    last = statistics.fmean(mb for at, mb in points if at >= 2 * end / 3)
    return {"middle_mb": middle, "last_mb": last, "growth": last / middle - 1}


def by_minute(latencies: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
    """Percentiles of what was due in each minute, ms."""
    minutes: dict[int, list[float]] = {}
    for due_s, taken_s in latencies:
        minutes.setdefault(int(due_s // 60), []).append(1000 * taken_s)
    rows = []
    for minute, taken in sorted(minutes.items()):
        p50, p99 = np.percentile(taken, (50, 99))
        rows.append({"minute": minute, "p50_ms": float(p50), "p99_ms": float(p99), "n": len(taken)})
    return rows


def write_tenants(path: Path) -> list[str]:
    """A tenants file for the run: their keys."""
    lines, keys = ["tenants:"], []
    for number in range(TENANTS):
        key, entry = new_key(date.today())
        keys.append(key)
        lines.append(f"  tenant-{number}: {{keys: [{{id: '{entry.id}', salt: '{entry.salt}',")
        lines.append(f"    sha256: '{entry.sha256}'}}], limits: {{requests_per_minute: 1000000,")
        lines.append("    tokens_per_minute: 1000000000, concurrency: 1000}}")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    path.chmod(0o600)
    return keys


async def measure(stack: Stack, keys: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Answers, capacity, and the soak."""
    redis = open_client(stack.redis_url, connect_timeout_s=5, max_connections=1)
    await redis.config_set("maxmemory", REDIS_BYTES)
    await close_client(redis)
    clients = [Client(stack.address, key=key, timeout_s=DEADLINE_S) for key in keys]
    try:
        questions = await known_questions(clients[0], options.questions)
        full = await capacity(Visitors(clients, questions, seed=0), 16, options.capacity_seconds)
        processes = {name: process.pid for name, process in stack.processes.items()}
        tally, sent, memory = await soak(
            Visitors(clients, questions, seed=1), options.share * full, 60 * options.minutes, processes
        )
    finally:
        for client in clients:
            await client.close()
    minutes = by_minute(tally.latencies)
    taken_ms = [1000 * taken for _, taken in tally.latencies]
    p50, p95, p99 = (float(each) for each in np.percentile(taken_ms, (50, 95, 99)))
    return {
        "capacity_per_s": full,
        "offered_per_s": options.share * full,
        "sent": sent,
        "outcomes": dict(tally.outcomes),
        "lost": sent - sum(tally.outcomes.values()),
        "caches": dict(tally.caches),
        "latency_ms": {"p50": p50, "p95": p95, "p99": p99},
        "minutes": minutes,
        "memory": {name: growth(points) for name, points in memory.items()},
        # a point a minute is enough to see by
        "memory_mb": {
            name: [(round(at), round(mb, 1)) for at, mb in points[:: round(60 / SAMPLE_EVERY_S)]]
            for name, points in memory.items()
        },
    }


def targets_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the claim is held to."""
    outcomes = results["outcomes"]
    bad = results["lost"] + sum(number for what, number in outcomes.items() if what not in {"right", "left"})
    return [
        report.target("requests wrong, failed, hung or lost", bad, 0),
        report.target("requests answered right", outcomes.get("right", 0), 1, least=True),
        *(
            report.target(f"{name}: last third over the middle one, - 1", found["growth"], FLAT)
            for name, found in results["memory"].items()
        ),
    ]


def show(results: Mapping[str, Any]) -> None:
    """The tables and the plot."""
    report.table(
        f"{results['sent']} requests at {results['offered_per_s']:.1f} a second",
        ("", "requests"),
        [*results["outcomes"].items(), ("lost", results["lost"]), *results["caches"].items()],
    )
    report.table(
        "memory, MB",
        ("process", "middle third", "last third", "growth"),
        [
            (name, found["middle_mb"], found["last_mb"], f"{100 * found['growth']:+.1f} %")
            for name, found in results["memory"].items()
        ],
    )
    memory = {name: [(at / 60, mb) for at, mb in points] for name, points in results["memory_mb"].items()}
    latency = {
        rank: [(row["minute"], row[f"{rank}_ms"]) for row in results["minutes"]] for rank in ("p50", "p99")
    }
    plots.plot(
        "soak",
        [
            plots.Panel(x="minutes", y="proportional set size, MB", lines=memory, title="memory"),
            plots.Panel(x="minutes", y="latency, ms", lines=latency, title="whole answers"),
        ],
    )


def main() -> None:
    """Measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--share", type=float, default=0.8, help="of the capacity")
    parser.add_argument("--capacity-seconds", type=float, default=60.0, help="of the closed loop")
    parser.add_argument("--questions", type=int, default=24, help="that are asked, each under three methods")
    options = parser.parse_args()
    with checkpoints.temporary() as folder:
        keys = write_tenants(folder / "tenants.yaml")
        environ = {"HIPRUNE_LLM_TENANTS": str(folder / "tenants.yaml"), "HIPRUNE_LLM_LOG_LEVEL": "warning"}
        if options.device != "cpu":
            environ |= {f"HIPRUNE_{each}_DEVICE": options.device for each in ("ENCODER", "LLM")}
        with Stack(environ=environ) as stack:
            results = asyncio.run(measure(stack, keys, options))
    targets = targets_of(results)
    show(results)
    report.print_targets(targets)
    settings = {
        "model": "embedded",
        "tenants": TENANTS,
        "redis": REDIS_BYTES,
        "kinds": SHARES,
        **{key: value for key, value in vars(options).items() if key != "device"},
    }
    name = report.name_on("soak", options.device)
    print(report.write(name, CLAIM, settings, results, device=options.device, targets=targets))


if __name__ == "__main__":
    main()
