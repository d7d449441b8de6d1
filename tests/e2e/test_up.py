"""`hiprune up`: every service is where it says, for those alone who have a key where there are tenants."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hiprune import Client, errors
from hiprune.cli import app
from hiprune.stack import free_port
from tests.stacks import picture, questions

SAMPLE = questions()[0]


@pytest.fixture
def tenants(tmp_path: Path) -> tuple[Path, str]:
    """A tenants file, and the key of its one tenant."""
    file = tmp_path / "tenants.yaml"
    made = CliRunner().invoke(app, ["tenant", "add", "acme", "--file", str(file)])
    assert made.exit_code == 0, made.output
    return file, made.stdout.strip()


@pytest.fixture
def start(tenants: tuple[Path, str]) -> Iterator[Callable[..., str]]:
    """Runs it with the tenants: what it has said when all is ready. Stops it in the end, as Ctrl-C does."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> str:
        up = subprocess.Popen(
            [Path(sys.executable).with_name("hiprune"), "up", "--no-redis", *arguments],
            env={**os.environ, "HIPRUNE_LLM_TENANTS": str(tenants[0]), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(up)
        assert up.stdout is not None
        said = ""
        for line in up.stdout:
            said += line
            if line.startswith("try:"):
                break
        return said

    yield start
    for each in started:
        each.send_signal(signal.SIGINT)
        assert each.wait(60) == 0


async def test_up_serves_clients_of_each_service_at_ports_of_their_own_and_keys_hold_everywhere(
    start, tenants
):
    _, key = tenants
    port, encoder_port = free_port(), free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wanted = taken.getsockname()[1]
        said = start(
            *("--port", str(port), "--http-port", str(free_port())),
            *("--pruner-port", str(wanted), "--encoder-port", str(encoder_port)),
        )
    assert f"port {wanted} is taken" in said
    found = re.search(r"HIPRUNE_PRUNER_ADDRESS=(\S+)", said)
    assert found, said
    addresses = {"pruner": found[1], "encoder": f"127.0.0.1:{encoder_port}"}
    assert all(f"ready: {address}" in said for address in addresses.values())
    image = picture(SAMPLE["image"])
    async with Client(f"127.0.0.1:{port}", **addresses, key=key) as client:
        answer = await client.ask(SAMPLE["question"], image)
        pruned = await client.prune(image)
        assert pruned.views[0].kept_indices == answer.media[0].views[0].kept_indices
        assert (await client.encode(image)).vision_digest == pruned.message.vision_digest
    async with Client(f"127.0.0.1:{port}", **addresses) as stranger:
        for asked in (stranger.ask("?", image), stranger.prune(image), stranger.encode(image)):
            with pytest.raises(errors.Unauthenticated):
                await asked
