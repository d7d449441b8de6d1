"""The demo: the same questions with NONE, HIPRUNE and HIPRUNE_PLUS_PLUS, in a table, and one picture."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from hiprune.client import Client
from hiprune.config import EMBEDDED_MODEL
from hiprune.overlay import draw_overlay
from hiprune.policies import policy
from hiprune.results import Answer, milliseconds
from hiprune.stack import Stack

SAMPLES: Final = EMBEDDED_MODEL.parents[1] / "samples"
_METHODS: Final = ("none", "hiprune", "hiprune++")


@dataclass(frozen=True, slots=True)
class Asked:
    """One question, and its answer by one method."""

    sample: dict[str, str]
    method: str
    answer: Answer

    @property
    def image(self) -> bytes:
        """The encoded image."""
        return (SAMPLES / self.sample["image"]).read_bytes()

    def content(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "image": self.sample["image"],
            "question": self.sample["question"],
            "truth": self.sample["truth"],
            "answer": self.answer.text,
            "first_text_s": round(self.answer.first_text_s, 6),
            "total_s": round(self.answer.total_s, 6),
            **self.answer.media[0].as_json(),
        }


def run_demo(console: Console, folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Starts the stack, asks, draws and stops; prints unless `quiet`. What came of it, for `--json`.

    Raises StackError and HipruneError.
    """
    started = time.perf_counter()
    with Console(stderr=True).status("starting") as status, Stack(progress=status.update) as stack:
        status.update("asking")
        ready = time.perf_counter() - started
        asked = asyncio.run(_ask_all(stack.address))
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "overlay.png"
    (kept,) = asked[-1].answer.media
    draw_overlay(asked[-1].image, kept.views[0].selection, tiled=kept.is_tiled, views=len(kept.views)).save(
        picture
    )
    if not quiet:
        _show(console, asked)
        console.print(f"kept patches drawn in [bold]{picture}[/bold]")
        console.print(
            f"[dim]ready after {ready:.1f} s, all after {time.perf_counter() - started:.1f} s[/dim]"
        )
    return {
        "overlay": str(picture),
        "ready_s": round(ready, 3),
        "answers": [each.content() for each in asked],
    }


async def _ask_all(address: str) -> list[Asked]:
    """Each question with each method."""
    async with Client(address) as client:
        found = []
        for sample in _samples():
            for method in _METHODS:
                asked = Asked(sample, method, Answer())
                answer = await client.ask(sample["question"], asked.image, policy=policy(method))
                found.append(replace(asked, answer=answer))
    return found


def _show(console: Console, asked: Sequence[Asked]) -> None:
    """A table a question."""
    console.print("The same questions, with all visual tokens and with a third of them", style="bold")
    for number in range(0, len(asked), len(_METHODS)):
        sample = asked[number].sample
        table = _table(f"{sample['image']}: {sample['question']} ({sample['truth']})")
        for each in asked[number : number + len(_METHODS)]:
            table.add_row(*_row(each))
        console.print(table)
    console.print("[dim]milliseconds; first: until the first word; a stage the cache saved is blank[/dim]")


def _table(title: str) -> Table:
    """Columns of one width in every table, 79 characters in all."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading, width in (("method", 9), ("answer", 13), ("tokens", 7), ("cache", 7)):
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


def _row(asked: Asked) -> list[str]:
    answer = asked.answer
    (pruned,) = answer.media
    after = milliseconds(answer.completion.timings)
    text = answer.text.strip()
    mark = "[green]✓[/green]" if text == asked.sample["truth"] else "[red]✗[/red]"
    return [
        asked.method,
        f"{text} {mark}",
        f"{pruned.tokens_before}→{pruned.tokens_kept}",
        pruned.cache.removesuffix(" hit"),
        _shown(pruned.timings_ms, "encode"),
        _shown(pruned.timings_ms, "select"),
        _shown(after, "prefill"),
        f"{answer.first_text_s * 1000:.0f}",
        f"{answer.total_s * 1000:.0f}",
    ]


def _shown(stages: Mapping[str, float], name: str) -> str:
    """A stage's milliseconds; nothing when it did not run."""
    if name not in stages:
        return ""
    return f"{stages[name]:.0f}" if stages[name] >= 1 else f"{stages[name]:.1f}"
