"""A client in another language, made from the plain protos alone, gets the answer that ours gets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hiprune.client import Client
from hiprune.stack import Stack
from hiprune.v1 import pruner_service_pb2
from tests.stacks import SAMPLES, questions

pytestmark = pytest.mark.extra
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "node" / "ask.mjs"
SAMPLE = questions()[0]


def ask_in_node(
    address: str, method: str = "hiprune", image: Path = SAMPLES / SAMPLE["image"]
) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = ["node", SCRIPT, address, image, SAMPLE["question"], method]
    return subprocess.run(command, capture_output=True, check=False, text=True, timeout=60)


def events_of(run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("method", ["none", "hiprune", "hiprune++"])
async def test_a_node_client_streams_the_answer_that_python_gets(
    stack: Stack, client: Client, method: str
) -> None:
    wire = pruner_service_pb2.Method.Value(f"METHOD_{method.upper().replace('++', '_PLUS_PLUS')}")
    ours = await client.ask(
        SAMPLE["question"],
        (SAMPLES / SAMPLE["image"]).read_bytes(),
        policy=pruner_service_pb2.PrunePolicy(method=wire),
    )

    first, *deltas, last = events_of(ask_in_node(stack.address, method))

    report = ours.report.media[0]
    (theirs,) = first["report"]
    assert theirs["method"] == pruner_service_pb2.Method.Name(wire)
    assert theirs["kept_indices"] == [list(view.kept_indices) for view in report.views]
    assert theirs["tokens_before"] == report.summary.tokens_before
    assert theirs["tokens_kept"] == report.summary.tokens_kept == sum(theirs["kinds"].values())
    assert theirs["cache"] == "CACHE_STATUS_PRUNED_HIT"  # we had asked before
    assert "".join(event["delta"] for event in deltas) == ours.text
    assert last["completion"]["finish_reason"] == "FINISH_REASON_STOP"
    assert last["completion"]["usage"]["prompt_tokens"] == ours.completion.usage.prompt_tokens


def test_a_node_client_is_told_what_is_wrong(stack: Stack, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    run = ask_in_node(stack.address, image=broken)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("INVALID_ARGUMENT: ")
    assert "image" in run.stderr


def test_a_node_client_is_told_that_nobody_is_there() -> None:
    run = ask_in_node("127.0.0.1:1")
    assert run.returncode == 1
    assert run.stderr.startswith("UNAVAILABLE: ")
