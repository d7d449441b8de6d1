"""All claims one after the other, each in a process of its own; one that fails does not keep the rest.

    python -m benchmarks [--device cuda] [--minutes N] [NAME ...]

A NAME is the module of a benchmark that takes a device, or `shared_memory`, which knows none; in quotes where
it takes options: "service_tax --size 0.5b". Without names: all that suit the device, what matters most first.
After `--minutes` nothing new is begun and what runs is ended, for a machine that is there for so long: what
was measured to its end by then is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import report

SUITE: Final = (
    "capture_overhead",
    "tower_scaling",
    "time_to_first_token",
    "selection_cost",
    "encoder_load",
    "service_tax",
    "service_tax --size 0.5b",
    "latency",
    "cache",
    "isolation",
    "gateway",
    "telemetry",
)
"""What `make bench` measures. Apart: full_size, which wants 24 GB; engines, evaluation and soak, which have
targets of their own in the Makefile; containers, which `make smoke` measures; chaos, which its tests do."""

WITHOUT_DEVICE: Final = ("shared_memory",)
"""What no device changes, measured where no other is asked for."""

_GRACE_S: Final = 10.0  # to end its services in, when time is over


@dataclass(slots=True)
class Run:
    """One benchmark's: how it ended, after how long, and what it was held to."""

    name: str
    outcome: str = "not begun"
    seconds: float = 0.0
    targets: list[dict[str, object]] = field(default_factory=list)


def names(device: str, chosen: Sequence[str] = ()) -> tuple[str, ...]:
    """What to run, in order."""
    return tuple(chosen) or (SUITE + WITHOUT_DEVICE if device == "cpu" else SUITE)


def command(name: str, device: str) -> list[str]:
    """A benchmark's command; one that knows no device is not told of any."""
    module, *options = shlex.split(name)
    told = [] if module in WITHOUT_DEVICE else ["--device", device]
    return [sys.executable, "-m", f"benchmarks.{module}", *options, *told]


def run(name: str, device: str, until_s: float | None) -> Run:
    """Runs one, its output where ours goes, until `until_s` (`time.monotonic`) at the latest."""
    begun_s, before = time.monotonic(), _written()
    found = Run(name)
    left_s = None if until_s is None else until_s - begun_s
    if left_s is not None and left_s <= 0:
        return found
    process = subprocess.Popen(command(name, device), start_new_session=True)
    try:
        code = process.wait(left_s)
        found.outcome = "measured" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        found.outcome = "out of time"
    finally:  # also when somebody interrupts
        _end(process)
    found.seconds = time.monotonic() - begun_s
    for path, changed_ns in _written().items():
        if before.get(path) != changed_ns:
            found.targets += json.loads(path.read_text("utf-8")).get("targets", [])
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """No service that it started outlives it."""
    with suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _written() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in report.RESULTS.glob("*.json")}


def main() -> None:
    """Runs them, and says at the end how each went. Exits with 1 where one did not measure what it claims."""
    parser = report.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all that suit the device")
    parser.add_argument("--minutes", type=float, help="at most; default: as long as it takes")
    options: argparse.Namespace = parser.parse_args()
    until_s = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    runs = []
    chosen = names(options.device, options.names)
    for number, name in enumerate(chosen, start=1):
        print(f"== {number} of {len(chosen)}: {name}", flush=True)
        runs.append(run(name, options.device, until_s))
    rows = [(each.name, each.outcome, each.seconds, _verdict(each)) for each in runs]
    report.table("benchmarks", ("", "", "seconds", "held to"), rows)
    report.print_targets([target for each in runs for target in each.targets])
    sys.exit(any(each.outcome != "measured" for each in runs))


def _verdict(found: Run) -> str:
    missed = sum(target["met"] is False for target in found.targets)
    return f"{missed} of {len(found.targets)} missed" if found.targets else "–"


if __name__ == "__main__":
    main()
