"""The demo: the same questions with NONE, HIPRUNE and HIPRUNE_PLUS_PLUS, in a table, and one picture."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table

from hiprune.client import Answer, Client
from hiprune.config import EMBEDDED_MODEL
from hiprune.overlay import draw_overlay
from hiprune.policies import CACHE_WORDS
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
            tables, image, kept = asyncio.run(_ask_all(stack.address))
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "overlay.png"
    draw_overlay(image, kept).save(picture)
    console.print("The same questions, with all visual tokens and with a third of them", style="bold")
    for table in tables:
        console.print(table)
    console.print("[dim]milliseconds; first: until the first word; a stage the cache saved is blank[/dim]")
    console.print(f"kept patches drawn in [bold]{picture}[/bold]")
    console.print(f"[dim]ready after {ready:.1f} s, all after {time.perf_counter() - started:.1f} s[/dim]")


async def _ask_all(address: str) -> tuple[list[Table], bytes, pruner_service_pb2.Selection]:
    """A table a question, and an image with what HIPRUNE_PLUS_PLUS kept of it."""
    tables = []
    image, kept = b"", pruner_service_pb2.Selection()
    async with Client(address) as client:
        for sample in _samples():
            image = (SAMPLES / sample["image"]).read_bytes()
            table = _table(f"{sample['image']}: {sample['question']} ({sample['truth']})")
            for name, method in _METHODS.items():
                policy = pruner_service_pb2.PrunePolicy(method=method)
                answer = await client.ask(sample["question"], image, policy=policy)
                table.add_row(*_row(sample, name, answer))
                kept = answer.report.media[0].views[0]
            tables.append(table)
    return tables, image, kept


def _table(title: str) -> Table:
    """Columns of one width in every table, 79 characters in all."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading, width in (("method", 10), ("answer", 10), ("tokens", 8), ("cache", 8)):
        table.add_column(heading, width=width, no_wrap=True)
    for heading in ("encode", "select", "prefill", "first", "total"):
        table.add_column(heading, width=max(5, len(heading)) + 1, justify="right", no_wrap=True)
    return table


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
        method,
        f"{text} {mark}",
        f"{report.summary.tokens_before}→{report.summary.tokens_kept}",
        CACHE_WORDS[report.cache].removesuffix(" hit"),
        _shown(before, "encode"),
        _shown(before, "select"),
        _shown(after, "prefill"),
        f"{answer.first_text_s * 1000:.0f}",
        f"{answer.total_s * 1000:.0f}",
    ]


def _shown(stages: dict[str, float], name: str) -> str:
    """A stage's milliseconds; nothing when it did not run."""
    if name not in stages:
        return ""
    return f"{stages[name]:.0f}" if stages[name] >= 1 else f"{stages[name]:.1f}"


def _milliseconds(timings: Iterable[encoder_service_pb2.StageTiming]) -> dict[str, float]:
    return {timing.stage: timing.duration.ToMicroseconds() / 1000 for timing in timings}
