"""The browser that the playground is tested in: Debian's Chromium. `python tools/browser.py` sees to it that
it is there.

Needs the standard library alone. Installs with apt-get where it runs as root, and else says what to do; never
downloads a browser of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
PACKAGES: Final = ("chromium", "fonts-liberation")
FLAGS: Final = (
    "--no-sandbox",  # which root has none of, and containers often lack
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find() -> str:
    """The program's path. Raises SystemExit with a sentence when there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    raise SystemExit(
        f"hiprune: no {NAMES[0]} is on PATH: install it, on Debian by `apt-get install {' '.join(PACKAGES)}`"
    )


def main() -> None:
    """Installs it where it is missing. Raises SystemExit when that cannot be done."""
    if any(map(shutil.which, NAMES)):
        return
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        find()  # says so
        return
    print(f"hiprune: installing {' and '.join(PACKAGES)}", flush=True)
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (("update",), ("install", "--yes", "--no-install-recommends", *PACKAGES)):
        if subprocess.run(
            [apt, "-qq", *step], env=environ, stdout=subprocess.DEVNULL, check=False
        ).returncode:
            raise SystemExit(f"hiprune: apt-get {step[0]} failed; its reason stands above")
    find()


if __name__ == "__main__":
    main()
