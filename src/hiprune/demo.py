"""The demo: the same questions with NONE, HIPRUNE and HIPRUNE_PLUS_PLUS, in a table, and one picture."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from hiprune.cli import CACHE_WORDS
from hiprune.client import Answer, Client
from hiprune.config import EMBEDDED_MODEL
from hiprune.overlay import draw_overlay
from hiprune.stack import Stack
from hiprune.v1 import encoder_service_pb2, pruner_service_pb2

SAMPLES: Final = EMBEDDED_MODEL.parents[1] / "samples"
_METHODS: Final = {
    "none": pruner_service_pb2.METHOD_NONE,
    "hiprune": pruner_service_pb2.METHOD_HIPRUNE,
    "hiprune++": pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS,
}


def run_demo(console: Console, folder: Path) -> None:
    """Starts the stack, asks, prints, draws and stops. Raises StackError."""
    started = time.perf_counter()
    with console.status("starting") as status:
        stack = Stack(progress=status.update)
        with stack:
            status.update("asking")
            ready = time.perf_counter() - started
            table, image, kept = asyncio.run(_ask_all(stack.address))
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "overlay.png"
    draw_overlay(image, kept).save(picture)
    console.print(table)
    console.print("time in ms; first: until the first word; encode and select: 0 where the cache answered")
    console.print(
        f"kept patches drawn in [bold]{picture}[/bold]   "
        f"(ready in {ready:.1f} s, all in {time.perf_counter() - started:.1f} s)"
    )


async def _ask_all(address: str) -> tuple[Table, bytes, pruner_service_pb2.Selection]:
    """The table, and an image with what HIPRUNE_PLUS_PLUS kept of it."""
    table = Table(title="One third of the visual tokens, the same questions")
    for heading in ("image", "question", "truth", "method", "answer", "tokens", "cache"):
        table.add_column(heading, no_wrap=True)
    for heading in ("encode", "select", "prefill", "first", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    image, kept = b"", pruner_service_pb2.Selection()
    async with Client(address) as client:
        for sample in _samples():
            image = (SAMPLES / sample["image"]).read_bytes()
            for name, method in _METHODS.items():
                policy = pruner_service_pb2.PrunePolicy(method=method)
                answer = await client.ask(sample["question"], image, policy=policy)
                table.add_row(*_row(sample, name, answer))
                kept = answer.report.media[0].views[0]
            table.add_section()
    return table, image, kept


def _samples() -> list[dict[str, str]]:
    """One question of each type, each on another image."""
    chosen: dict[str, dict[str, str]] = {}
    for sample in json.loads((SAMPLES / "questions.json").read_text("utf-8")):
        images = {each["image"] for each in chosen.values()}
        if sample["type"] not in chosen and sample["image"] not in images:
            chosen[sample["type"]] = sample
    return list(chosen.values())


def _row(sample: dict[str, str], method: str, answer: Answer) -> list[str]:
    report = answer.report.media[0]
    before = _milliseconds(report.timings)
    after = _milliseconds(answer.completion.timings)
    text = answer.text.strip()
    mark = "[green]✓[/green]" if text == sample["truth"] else "[red]✗[/red]"
    return [
        sample["image"].removesuffix(".png"),
        sample["question"],
        sample["truth"],
        method,
        f"{mark} {text}",
        f"{report.summary.tokens_before} → {report.summary.tokens_kept}",
        CACHE_WORDS[report.cache],
        f"{before.get('encode', 0):.0f}",
        f"{before.get('select', 0):.1f}",
        f"{after.get('prefill', 0):.0f}",
        f"{answer.first_text_s * 1000:.0f}",
        f"{answer.total_s * 1000:.0f}",
    ]


def _milliseconds(timings: Iterable[encoder_service_pb2.StageTiming]) -> dict[str, float]:
    return {timing.stage: timing.duration.ToMicroseconds() / 1000 for timing in timings}
