"""Claim: whatever is killed, paused or cut off, a request ends right, or in time and may be tried again.

    python -m benchmarks.chaos

Runs `tests/chaos`, which hurts real processes and judges every answer, and writes down what its clients
counted. A run in which a test fails writes nothing. Knows the tests by their counts alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks import report

CLAIM: Final = (
    "whatever is killed, paused or cut off, a request ends with the right answer, or within its deadline "
    "with a status that may be tried again"
)
ROOT: Final = Path(__file__).resolve().parents[1]


def counted(tests: str = "tests/chaos") -> list[dict[str, Any]]:
    """Of each test its fault, the answers that were right, and by status what is to be tried again.

    Raises SystemExit where a test fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.json"
        command = [sys.executable, "-m", "pytest", "-m", "extra", tests]
        ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "HIPRUNE_COUNTS": str(path)}, check=False)
        if ran.returncode:
            raise SystemExit("the promise was broken: see above; nothing is written")
        found: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
        return found


def main() -> None:
    """Runs it and writes `results/chaos.json`."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    busy = os.getloadavg()[0]
    faults = counted()
    settings = {"model": "the included one", "clients": 6, "load_before": round(busy, 2)}
    print(f"written: {report.write('chaos', CLAIM, settings, {'faults': faults})}")


if __name__ == "__main__":
    main()
