"""The README's ways to ask do what it says, as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hiprune.stack import Stack

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "127.0.0.1:50053"
README = (ROOT / "README.md").read_text("utf-8")


def run(command: Sequence[str | Path]) -> str:
    """What a command prints. Run from the repository, as the README has it."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def line_with(start: str) -> list[str]:
    """The arguments of the README's shell command that starts so."""
    (line,) = re.findall(rf"^{re.escape(start)} .+$", README, flags=re.MULTILINE)
    return shlex.split(line)


def test_the_python_example_answers(stack: Stack) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert ADDRESS in program
    said = run([sys.executable, "-c", program.replace(ADDRESS, stack.address)])
    found = re.fullmatch(r".+ \(from (\d+) of (\d+) visual tokens\)\n", said)
    assert found, said
    assert int(found[1]) == round(int(found[2]) / 3)


def test_the_command_line_example_answers_and_draws(stack: Stack, tmp_path: Path) -> None:
    _, *arguments = line_with(".venv/bin/hiprune ask")
    picture = tmp_path / "kept.png"
    arguments[arguments.index("--overlay") + 1] = str(picture)
    program = Path(sys.executable).with_name("hiprune")
    assert run([program, *arguments, "--address", stack.address]).strip()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.extra
def test_the_node_example_answers(stack: Stack) -> None:
    command = [stack.address if word == ADDRESS else word for word in line_with("node examples/node/ask.mjs")]
    assert '{"delta":' in run(command)
