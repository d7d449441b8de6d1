"""Fixtures of the chaos tests: one stack that they all hurt and that must be well again after each."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from hiprune import cli
from hiprune.client import Client
from hiprune.stack import SERVICES, Stack
from hiprune.v1 import pruner_service_pb2 as pb
from tests.chaos.load import CLIENTS, Ask, Judge, Load, Tally, asks

COUNTS: list[tuple[str, Tally]] = []
"""What each test counted, for the end of the run."""

SLOTS = 4
"""Answers at a time: the default of the language model's service."""
QUEUE = 16
"""Requests that may wait for the language model."""
CONCURRENCY = CLIENTS + 2
"""What the tenant `load` may have running at a time: a place that is not given back is soon missed."""


@dataclass
class House:
    """A running stack, its tenants' keys, and the right answers."""

    stack: Stack
    keys: dict[str, str]
    judge: Judge

    def client(self, tenant: str = "load", timeout_s: float = 10) -> Client:
        """One client."""
        return Client(self.stack.address, key=self.keys[tenant], timeout_s=timeout_s)

    def redis(self) -> redis.Redis:
        """The stack's Redis, past everything."""
        return redis.Redis(unix_socket_path=self.stack.redis_url.removeprefix("unix://"))

    def logged(self, service: str, text: str) -> int:
        """How often a service has said something."""
        return self.stack.log_of(service).count(text)

    async def restart(self, name: str) -> None:
        """Starts an ended service as a supervisor would: again, at the same address."""
        self.stack.start_service(name)
        await asyncio.to_thread(self.stack.wait_ready, name)

    async def warm(self) -> None:
        """Returns when the cache holds everything that the clients ask again and again."""
        async with self.client("crowd") as client, asyncio.timeout(60):

            async def keep(ask: Ask) -> None:
                while (await ask.of(client)).report.media[0].cache != pb.CACHE_STATUS_PRUNED_HIT:
                    pass

            for first in range(0, len(self.judge.asks), SLOTS):
                await asyncio.gather(*map(keep, self.judge.asks[first : first + SLOTS]))

    def encoding(self) -> int:
        """How many pictures the pruner waits for, by the claims that it has on them."""
        with self.redis() as server:
            return sum(b":l:" in key for key in server.scan_iter(count=10_000))

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """A process that stands still, alive; it goes on at the end."""
        process = self.stack.processes[name]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="package")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A tenants file and its keys: `load` has limits that are counted, `crowd` has none."""
    file = tmp_path_factory.mktemp("tenants") / "tenants.yaml"
    limits = {
        "load": f"--requests-per-minute 1000000 --tokens-per-minute 1000000000 --concurrency {CONCURRENCY}",
        "crowd": "",
    }
    keys = {}
    for name, said in limits.items():
        result = CliRunner().invoke(cli.app, ["tenant", "add", name, *said.split(), "--file", str(file)])
        assert result.exit_code == 0, result.output
        keys[name] = result.stdout.strip()
    return file, keys


@pytest.fixture(scope="package")
async def house(tenants: tuple[Path, dict[str, str]]) -> AsyncIterator[House]:
    """Redis and the three services on Unix sockets, and what they answer while all is well."""
    file, keys = tenants
    environ = {
        "HIPRUNE_LLM_TENANTS": str(file),
        "HIPRUNE_PRUNER_TENANTS": str(file),
        "HIPRUNE_LLM_MAX_QUEUE": str(QUEUE),
    }
    with Stack(environ=environ) as stack:
        async with Client(stack.address, key=keys["load"]) as client:
            judge = await Judge.of(client, asks())
        yield House(stack, keys, judge)
        assert set(stack.processes) == {"redis", *SERVICES}


class Counting:
    """The clients of one test."""

    def __init__(self) -> None:
        self._loads: list[Load] = []

    def add(self, load: Load) -> Load:
        """Counts what these clients count."""
        self._loads.append(load)
        return load

    @property
    def tally(self) -> Tally:
        """All their requests."""
        return sum((load.tally for load in self._loads), Tally())


@pytest.fixture
def counting(request: pytest.FixtureRequest) -> Iterator[Counting]:
    """What a test's clients count is printed, kept for the end of the run, and held against the promise."""
    made = Counting()
    yield made
    whole = made.tally
    print(f"\n{whole}")
    COUNTS.append((named(request.node.name), whole))
    assert not whole.wrong, whole.wrong[:3]
    assert not whole.other, whole.other[:3]
    assert not whole.late, whole.late[:3]
    assert not whole.hung
    assert whole.right


@pytest.fixture
def make_load(house: House, counting: Counting) -> Callable[..., Load]:
    """Clients of the house, by default of the tenant `load`: `async with make_load() as load: …`."""

    def make(address: str = "", tenant: str = "load", **options: Any) -> Load:
        load = Load(address or house.stack.address, house.judge, key=house.keys[tenant], **options)
        return counting.add(load)

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The counts of all tests, where a reader finds them."""
    if COUNTS:
        terminalreporter.section("requests under faults")
        for name, tally in COUNTS:
            terminalreporter.write_line(f"{name}: {tally}")
    if path := os.environ.get("HIPRUNE_COUNTS"):  # for benchmarks.chaos
        counts = [
            {"fault": name, "right": tally.right, "again": dict(tally.retryable)} for name, tally in COUNTS
        ]
        Path(path).write_text(json.dumps(counts), "utf-8")


def named(test: str) -> str:
    """A test's name in words."""
    return test.removeprefix("test_").replace("_", " ")
