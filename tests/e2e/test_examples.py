"""The examples run as they stand, and what docs/client.md and docs/cli.md show does what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import hiprune
from hiprune.stack import Stack
from tests.stacks import FACTS, SAMPLES, picture, questions

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "python"
CLIP = "models/shapes/checkpoint/clip"
SAMPLE = questions()[0]
IMAGE = str(SAMPLES / SAMPLE["image"])


def environ_of(stack: Stack) -> dict[str, str]:
    """Where the services are."""
    return {
        **os.environ,
        "HIPRUNE_ADDRESS": stack.address,
        "HIPRUNE_PRUNER_ADDRESS": stack.pruner_address,
        "HIPRUNE_ENCODER_ADDRESS": stack.encoder_address,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def run(stack: Stack, command: list[str], **options) -> list[str]:
    """The lines that a command prints, run from the repository."""
    done = subprocess.run(
        command,
        env=environ_of(stack),
        cwd=options.get("cwd", ROOT),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def example(stack: Stack, name: str, *arguments: str) -> list[str]:
    return run(stack, [sys.executable, str(EXAMPLES / name), *arguments])


async def test_ask_answers_as_the_client_does(stack, client):
    answer = await client.ask(
        SAMPLE["question"], picture(SAMPLE["image"]), policy=hiprune.policy("hiprune++", keep=1 / 3)
    )
    text, kept = example(stack, "ask.py", IMAGE, SAMPLE["question"])
    assert text == answer.text.strip()
    assert kept.startswith(f"{answer.tokens_kept} of {answer.tokens_before} visual tokens")


def test_ask_says_in_one_line_what_was_refused(stack, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    command = [sys.executable, str(EXAMPLES / "ask.py"), str(broken), "?"]
    done = subprocess.run(command, env=environ_of(stack), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"InvalidInput: .*image.*\n", done.stderr)


def test_stream_tells_both_turns_event_by_event(stack):
    said = example(stack, "stream.py", IMAGE, SAMPLE["question"], questions()[1]["question"])
    kept, answer, usage, kept_again, other, usage_again = said
    assert kept == kept_again
    assert kept.startswith("kept: ")
    assert answer.strip()
    assert other.strip()
    tokens, more = (int(line.split()[0]) for line in (usage, usage_again))
    assert more > tokens  # the first turn and its answer are in the second prompt


async def test_tokens_of_an_encoder_of_ones_own_are_pruned_as_the_services_prune_theirs(stack):
    async with hiprune.Client(pruner=stack.pruner_address) as client:
        ours = await client.prune(
            picture(SAMPLE["image"]),
            policy=hiprune.policy("hiprune++", keep=1 / 3),
            question=SAMPLE["question"],
        )
    layer = str(FACTS.object_layer)
    first, second = example(stack, "prune_tokens.py", CLIP, IMAGE, SAMPLE["question"], layer)
    assert first == f"{ours.tokens_before} tokens became {ours.tokens_kept}: {ours.views[0].counts}"
    rows = [int(number) for number in re.findall(r"\d+", second.partition("rows")[2])]
    assert rows == list(ours.views[0].kept_indices)[: len(rows)]


# --- the pages ---------------------------------------------------------------------------------------------


def blocks(page: str, language: str) -> list[str]:
    """The code of a page, in its order."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_programs_on_the_page_of_the_client_run(stack):
    programs = blocks("client.md", "python")
    assert len(programs) >= 3
    # one interpreter for all, which is quicker; each is a whole program all the same
    whole = "\n".join(f"exec(compile({each!r}, 'client.md', 'exec'), {{}})" for each in programs)
    own = {"50053": stack.address, "50052": stack.pruner_address, "50051": stack.encoder_address}
    for port, address in own.items():
        whole = whole.replace(f"127.0.0.1:{port}", address)
    assert len(run(stack, [sys.executable, "-c", whole])) >= len(programs)


def test_the_commands_on_the_page_of_the_command_line_run(stack, tmp_path):
    (tmp_path / "models").symlink_to(ROOT / "models")
    ran = 0
    for block in blocks("cli.md", "sh"):
        for line in block.splitlines():
            if re.match(r"hiprune (ask|prune|compare|bench|doctor) ?", line):
                run(stack, ["sh", "-c", line], cwd=tmp_path)
                ran += 1
    assert ran >= 5
    assert {"kept.png", "compare.png"} <= {path.name for path in tmp_path.iterdir()}
