"""What every benchmark prints and writes: a table, a dated JSON file with hardware and versions, a plot.

Figures are ratios of two things run side by side in one call, with medians; single times are context.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).parent / "results"


def hardware() -> dict[str, Any]:
    """The machine, as far as a reader needs it to judge a figure."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Versions of what decides speed."""
    names = ("torch", "transformers", "grpcio", "protobuf")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, the middle half, and how many."""
    quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": quarters[1], "p25": quarters[0], "p75": quarters[2], "n": len(values)}


def pairs(
    first: Callable[[], float], second: Callable[[], float], *, count: int, warm_up: int
) -> tuple[list[float], list[float]]:
    """Seconds of two things run in turn, A B B A …, so that a drift of the machine meets both alike."""
    for _ in range(warm_up):
        first()
        second()
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(count):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for which in order:
            times[which].append((first, second)[which]())
    return times


def write(name: str, claim: str, settings: Mapping[str, Any], results: Any) -> Path:
    """Writes `results/NAME.json` and returns its path. `claim` is the sentence that the figures are about."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "benchmark": name,
        "claim": claim,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "settings": dict(settings),
        "results": results,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return path


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title)
    for place, heading in enumerate(headings):
        grid.add_column(heading, justify="left" if place == 0 else "right")
    for row in rows:
        grid.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(grid)
