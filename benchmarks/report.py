"""What every benchmark shares: how it measures, and what it prints and writes.

Figures are ratios of two things run side by side in one call, with medians; single times are context.
A benchmark prints a table and writes `results/NAME.json`, dated, with hardware and versions, and a plot
(`benchmarks.plots`). Knows no model. rich is asked for only when there is something to print.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

RESULTS: Final = Path(__file__).parent / "results"
MB: Final = 2**20


# --- a run -----------------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """A benchmark's options: its docstring as help, and the device that all of them take."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the models run")
    return made


def name_on(name: str, device: str) -> str:
    """The result's name: one device's never overwrites another's."""
    return name if device == "cpu" else f"{name}_{device}"


def dtype_on(device: str) -> Any:
    """The type in which the services run models there: a `torch.dtype`."""
    import torch

    return torch.float32 if device == "cpu" else torch.bfloat16


def hardware(device: str = "cpu") -> dict[str, Any]:
    """The machine, as far as a reader needs it to judge a figure."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text("utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), model)
    found = {
        "device": device,
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": None,
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            "gpu_driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return found


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.split("\n")[0].strip() or None


def versions() -> dict[str, str]:
    """Versions of what decides speed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "triton", "grpcio", "protobuf"):
        with suppress(PackageNotFoundError):  # a bare GPU host has no gRPC, a CPU build no Triton
            found[name] = version(name)
    return found


# --- time ------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Waits for what a GPU still has to do; a CPU has done it."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """How long `work` takes, all that it queued on the device included."""
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


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


def ratios(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """The spread of `first / second`, pair by pair."""
    return spread([a / b for a, b in zip(first, second, strict=True)])


def compare(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    count: int,
    warm_up: int,
    device: str = "cpu",
    description: str = "",
) -> dict[str, Any]:
    """Two things in interleaved pairs: milliseconds of both, and the ratio of the first to the second."""
    with progress(description, 2 * (count + warm_up)) as step:

        def timed(work: Callable[[], object]) -> Callable[[], float]:
            def run() -> float:
                taken = seconds(work, device)
                step()
                return taken

            return run

        times = pairs(timed(first), timed(second), count=count, warm_up=warm_up)
    first_ms, second_ms = ([1000 * value for value in each] for each in times)
    return {
        "ratio": ratios(first_ms, second_ms),
        "first_ms": spread(first_ms),
        "second_ms": spread(second_ms),
    }


def stage_ms(timings: Iterable[Any]) -> dict[str, float]:
    """Milliseconds by stage of a service's answer; stages of one name add up."""
    found: dict[str, float] = {}
    for timing in timings:
        found[timing.stage] = found.get(timing.stage, 0.0) + timing.duration.ToMicroseconds() / 1000
    return found


def matmul_peak(device: str, dtype: Any, *, side: int = 0) -> float:
    """TFLOP/s of one large square matrix product, the best of ten: what this machine gives at most."""
    import torch

    side = side or (2048 if device == "cpu" else 8192)
    # random and not zeros: a GPU that multiplies zeros draws less power and clocks higher
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    best = min(seconds(lambda: torch.matmul(left, right, out=out), device) for _ in range(10))
    return 2 * side**3 / best / 1e12


# --- memory ----------------------------------------------------------------------------------------------


class PeakMemory:
    """The most memory that a block holds above what was held when it began.

        with PeakMemory("cpu") as peak:
            ...
        peak.bytes  # None where the system does not tell

    On a CPU the peak resident set of the whole process (Linux), so measure in a process of its own, see
    `in_child`, its weights in memory already: mapped pages count when they are first read. On a GPU what
    torch's allocator handed out.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.bytes: int | None = None

    def __enter__(self) -> Self:
        if self._device == "cpu":
            self._start = _reset_resident_peak()
        else:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None or self._start is None:
            return
        if self._device == "cpu":
            self.bytes = max(0, _status_bytes()["VmHWM"] - self._start)
        else:
            import torch

            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._start


def _reset_resident_peak() -> int | None:
    """Sets the peak resident set to the present one, which is returned; None where that cannot be done."""
    with suppress(OSError, AttributeError):  # glibc keeps freed memory, which would hide what is allocated
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")  # proc(5): 5 resets the peak
        return _status_bytes()["VmRSS"]
    except (OSError, KeyError):
        return None


def _status_bytes() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(text.split()[0]) * 1024 for name, text in fields.items() if text.endswith("kB")}


def in_child(work: Callable[..., Value], *arguments: Any) -> Value:
    """`work(*arguments)` in a fresh process, which ends with it: nothing that ran before is in its memory.

    `work` is a module's function, and what goes in and comes out can be pickled.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as child:
        return child.submit(work, *arguments).result()


def line_fit(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """The straight line through the points and how much of their variance it explains."""
    import numpy as np

    slope, intercept = np.polyfit(xs, ys, 1)
    rest = np.asarray(ys) - (slope * np.asarray(xs) + intercept)
    total = float(((np.asarray(ys) - np.mean(ys)) ** 2).sum())
    r2 = 1 - float((rest**2).sum()) / total if total else 1.0
    # on a doubly logarithmic scale, the slope is the power of growth: 1 is linear, 2 is quadratic
    power = float(np.polyfit(np.log(xs), np.log(np.maximum(ys, 1)), 1)[0])
    return {"slope": float(slope), "intercept": float(intercept), "r2": r2, "power": power}


# --- what is written -------------------------------------------------------------------------------------


def target(what: str, measured: float | None, limit: float, *, least: bool = False) -> dict[str, Any]:
    """One figure that a claim is held to: at most `limit`, or at least, and whether it is met."""
    met = None if measured is None else (measured >= limit if least else measured <= limit)
    return {"what": what, "measured": measured, "least" if least else "most": limit, "met": met}


def write(
    name: str,
    claim: str,
    settings: Mapping[str, Any],
    results: Any,
    *,
    device: str = "cpu",
    targets: Sequence[Mapping[str, Any]] = (),
    folder: Path | None = None,
) -> Path:
    """Writes `results/NAME.json` and returns its path. `claim` is the sentence that the figures are about.

    `NAME` begins with the name of the benchmark's module. `folder`: another than `results`.
    """
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {
        "benchmark": name,
        "claim": claim,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(device),
        "versions": versions(),
        "settings": dict(settings),
        **({"targets": list(targets)} if targets else {}),
        "results": results,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    whole = path.with_suffix(".new")
    whole.write_text(text + "\n", "utf-8")
    whole.replace(path)  # who is ended while it writes leaves no half of it
    return path


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title)
    for place, heading in enumerate(headings):
        grid.add_column(heading, justify="left" if place == 0 else "right")
    for row in rows:
        grid.add_row(*(short(cell) if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(grid)


def short(value: float) -> str:
    """Three digits that count, never a power of ten: 0.0123, 1.23, 12300."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_targets(targets: Sequence[Mapping[str, Any]]) -> None:
    """Prints what the claim is held to, and whether it holds."""
    if not targets:
        return
    words = {True: "met", False: "MISSED", None: "not measured"}
    rows = [
        (
            each["what"],
            "–" if each["measured"] is None else float(each["measured"]),
            f"≥ {each['least']:g}" if "least" in each else f"≤ {each['most']:g}",
            words[each["met"]],
        )
        for each in targets
    ]
    table("held to", ("", "measured", "target", ""), rows)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; yields what to call after each of `total` steps. Without a description: silent."""
    if not description:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def track(items: Iterable[Item], description: str) -> Iterator[Item]:
    """The items, with a progress bar."""
    listed = list(items)
    with progress(description, len(listed)) as step:
        for item in listed:
            yield item
            step()
