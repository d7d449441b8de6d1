"""How much memory a process has taken, as Linux counts it; elsewhere nothing is measured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Memory:
    """What `memory_of` fills in at its end, in bytes."""

    grew: int = 0
    """How far the process ever was above where it began."""
    kept: int = 0
    """How far it still is."""


@contextlib.contextmanager
def memory_of(pid: int | None = None) -> Iterator[Memory]:
    """Watches a process of ours; None: this one."""
    folder = Path("/proc") / str(pid or os.getpid())
    memory = Memory()
    if not folder.exists():
        yield memory
        return
    with contextlib.suppress(OSError):
        (folder / "clear_refs").write_text("5")  # the highest so far is what there is now
    before = _read(folder)["VmRSS"]
    yield memory
    after = _read(folder)
    memory.grew, memory.kept = after["VmHWM"] - before, after["VmRSS"] - before


def _read(folder: Path) -> dict[str, int]:
    lines = (line.split() for line in (folder / "status").read_text("ascii").splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[0].startswith("Vm")}
