"""Load on a running service: so many clients that ask without pause, and what came of it.

A tool to see how a service behaves, on whatever machine, beside whatever else runs there; claims are made by
`benchmarks/`. Knows the front door alone.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
import statistics
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Final

from hiprune.client import Client
from hiprune.errors import HipruneError
from hiprune.results import Answer
from hiprune.v1 import llm_service_pb2, pruner_service_pb2

_PERCENTILES: Final = (50, 95, 99)
_WORST_PAUSE_S: Final = 1.0
"""Longest wait before a client whose request was refused asks again: what is refused at once is no load."""
_LAST_S: Final = 2.0
"""Time for requests under way when a run is cancelled."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked, by how many at a time, and how often or how long."""

    question: str
    images: Sequence[bytes]
    policies: Mapping[str, pruner_service_pb2.PrunePolicy]
    """By name. Two are asked in turns, so that whatever else the machine does meets both alike."""
    sampling: llm_service_pb2.Sampling
    concurrency: int
    requests: int | None
    """Of each policy; None: until `seconds` are over."""
    seconds: float | None = None
    """After which nothing more is asked; what has been asked by then still counts."""
    fresh: bool = False
    """Show each request a picture that no cache has seen; images must be PNG files (`as_png`)."""


@dataclass(slots=True)
class Tally:
    """What came of one policy's requests."""

    first_s: list[float] = field(default_factory=list)
    """Seconds to the first text, of each answer."""
    total_s: list[float] = field(default_factory=list)
    tokens_before: Counter[int] = field(default_factory=Counter)
    tokens_kept: Counter[int] = field(default_factory=Counter)
    caches: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    """Refused and failed requests, by reason."""
    generated: int = 0
    """Tokens."""

    def add(self, answer: Answer) -> None:
        """Counts an answer."""
        self.first_s.append(answer.first_text_s or answer.total_s)
        self.total_s.append(answer.total_s)
        for media in answer.media:
            self.tokens_before[media.tokens_before] += 1
            self.tokens_kept[media.tokens_kept] += 1
            self.caches[media.cache] += 1
        self.generated += answer.completion.usage.completion_tokens

    def content(self) -> dict[str, Any]:
        """For `--json`; times in milliseconds."""
        return {
            "answers": len(self.total_s),
            "errors": dict(self.errors),
            "first_text_ms": _percentiles(self.first_s),
            "total_ms": _percentiles(self.total_s),
            "tokens_before": _mean(self.tokens_before),
            "tokens_kept": _mean(self.tokens_kept),
            "cache": dict(self.caches),
        }


@dataclass(slots=True)
class Result:
    """What came of a plan."""

    tallies: dict[str, Tally]
    wall_s: float = 0.0

    def content(self) -> dict[str, Any]:
        """For `--json`: each policy's figures and, of two, the first's times over the second's."""
        found: dict[str, Any] = {
            "seconds": round(self.wall_s, 3),
            "answers_per_s": self._a_second(sum(len(each.total_s) for each in self.tallies.values())),
            "generated_tokens_per_s": self._a_second(sum(each.generated for each in self.tallies.values())),
            "policies": {name: tally.content() for name, tally in self.tallies.items()},
        }
        if len(self.tallies) == 2:
            found["ratio"] = self.ratio()
        return found

    def _a_second(self, count: int) -> float:
        return round(count / self.wall_s, 3)

    def ratio(self) -> dict[str, float | None]:
        """The first policy's median times over the second's; None where one of them has no answer."""
        one, other = self.tallies.values()
        return {
            "first_text": _ratio(one.first_s, other.first_s),
            "total": _ratio(one.total_s, other.total_s),
        }


async def run_load(client: Client, plan: Plan, done: Callable[[], object]) -> Result:
    """Asks as planned; `done` hears of every request that has ended. A cancelled run gives what it has."""
    result = Result({name: Tally() for name in plan.policies})
    jobs = _jobs(plan)
    over = asyncio.Event()
    if plan.seconds is not None:
        asyncio.get_running_loop().call_later(plan.seconds, over.set)
    begun = time.perf_counter()
    workers = [
        asyncio.create_task(_work(client, plan, jobs, result, over, done)) for _ in range(plan.concurrency)
    ]
    try:
        # shielded: cancelled, they would be in the middle of something
        await asyncio.shield(working := asyncio.gather(*workers))
    except asyncio.CancelledError:
        over.set()
        await asyncio.wait({working}, timeout=_LAST_S)
        if not any(tally.total_s for tally in result.tallies.values()):
            raise
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        result.wall_s = time.perf_counter() - begun
    return result


def _jobs(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """Policies in turns, each of them over the images in turn."""
    rounds = itertools.count() if plan.requests is None else range(plan.requests)
    for number in rounds:
        # who comes first alternates, as does who finds what the other has put into the cache
        names = list(plan.policies)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            yield name, plan.images[number % len(plan.images)]


async def _work(
    client: Client,
    plan: Plan,
    jobs: Iterator[tuple[str, bytes]],
    result: Result,
    over: asyncio.Event,
    done: Callable[[], object],
) -> None:
    """One client: the next job as soon as the last one has ended."""
    for name, image in jobs:
        if over.is_set():
            return  # and others end what they have begun: without the slow ones, percentiles would flatter
        tally = result.tallies[name]
        try:
            answer = await client.ask(
                plan.question,
                with_comment(image, secrets.token_hex(16)) if plan.fresh else image,
                policy=plan.policies[name],
                sampling=plan.sampling,
            )
        except HipruneError as error:
            tally.errors[error.reason] += 1
            done()
            await asyncio.sleep(min(error.retry_after_s or 0.05, _WORST_PAUSE_S))
        else:
            tally.add(answer)
            done()


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of 100 of `values`, at least one, do not exceed: the nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)]


def as_png(image: bytes) -> bytes:
    """The same picture as a PNG file."""
    from hiprune.overlay import open_upright

    made = BytesIO()
    open_upright(image).save(made, "PNG")
    return made.getvalue()


def with_comment(png: bytes, comment: str) -> bytes:
    """The same PNG file with a comment of its own: other bytes, and so nothing that a cache has seen."""
    chunk = b"tEXt" + b"Comment\0" + comment.encode("latin-1")
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = png.rindex(b"IEND") - 4
    return png[:end] + whole + png[end:]


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"p{share}": round(percentile(seconds, share) * 1000, 3) for share in _PERCENTILES}


def _ratio(one: Sequence[float], other: Sequence[float]) -> float | None:
    if not (one and other):
        return None
    return round(statistics.median(one) / statistics.median(other), 4)


def _mean(counts: Counter[int]) -> float | None:
    total = sum(counts.values())
    return round(sum(value * count for value, count in counts.items()) / total, 3) if total else None
