"""Claims about services that are killed, drained and started again under load: what is lost says so."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from hiprune.stack import free_port
from tests.chaos.conftest import QUEUE, SLOTS
from tests.chaos.load import DEADLINE_S, Tally, judged, until

pytestmark = pytest.mark.extra

GONE = {"encoder": "UNAVAILABLE ENCODER_", "pruner": "UNAVAILABLE PRUNER_", "llm": "UNAVAILABLE LLM_"}


async def test_an_encoder_killed_and_started_again_costs_new_pictures_a_retry_and_known_ones_nothing(
    house, make_load
):
    await house.warm()
    async with make_load() as load:
        await load.right(30)
        house.stack.end("encoder", signal.SIGKILL)
        await until(lambda: load.fresh.refused >= 5)
        known = load.known.right
        await until(lambda: load.known.right >= known + 30)
        await house.restart("encoder")
        await load.right(60)
    assert load.known.refused == 0
    assert all(status.startswith(GONE["encoder"]) for status in load.tally.retryable), load.tally.retryable


@pytest.mark.parametrize("name", ["pruner", "llm"])
async def test_a_service_killed_and_started_again_costs_a_retry(house, make_load, name):
    # a tenant without a limit of requests at a time: those that were lost would hold their places for as long
    # as their deadlines say
    async with make_load(tenant="crowd") as load:
        await load.right(30)
        house.stack.end(name, signal.SIGKILL)
        await until(lambda: load.tally.refused >= 5)
        await house.restart(name)
        await load.right(60)
    assert all(status.startswith(GONE[name]) for status in load.tally.retryable), load.tally.retryable


@pytest.mark.parametrize("name", ["pruner", "llm"])
async def test_a_service_told_to_stop_ends_what_it_began(house, make_load, name):
    """The encoder stands still, so that what was begun is still running when the service is told."""
    tally, draining = Tally(), house.logged(name, "draining")
    count = SLOTS if name == "pruner" else SLOTS + QUEUE // 2
    async with house.client("crowd") as client:
        with house.stopped("encoder"):
            held = [
                asyncio.create_task(
                    judged(house.judge, client, ask, tally, deadline_s=DEADLINE_S, fresh=True)
                )
                for ask in house.judge.asks[:count]
            ]
            await until(lambda: house.encoding() == SLOTS)
            ending = asyncio.create_task(asyncio.to_thread(house.stack.end, name))
            await until(lambda: house.logged(name, "draining") > draining)
            if name == "llm":
                async with make_load() as load:
                    await until(lambda: load.tally.refused >= 5)
                assert load.tally.right == 0
        await asyncio.gather(*held)
    assert (tally.right, tally.ended) == (count, count), str(tally)
    async with make_load() as load:
        await ending
        await until(lambda: load.tally.refused >= 5)
        await house.restart(name)
        await load.right(30)
    assert all(status.startswith(GONE[name]) for status in load.tally.retryable), load.tally.retryable


def connections(address: str) -> int:
    """How many TCP connections a port of this machine has, as Linux lists them."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    tables = (Path("/proc/net") / name for name in ("tcp", "tcp6"))
    lines = (line.split() for table in tables for line in table.read_text("ascii").splitlines()[1:])
    return sum(words[1].endswith(port) and words[3] == "01" for words in lines)


async def test_a_rolling_restart_of_two_language_models_loses_no_request(house, make_load):
    stack = house.stack
    other = f"127.0.0.1:{free_port()}"
    replica = stack.start_replica("llm", other)
    try:
        await asyncio.to_thread(stack.wait_ready, replica)
        async with make_load(f"ipv4:{stack.address},{other}") as load:
            await until(lambda: connections(stack.address) and connections(other))
            await load.right(60)
            await asyncio.to_thread(stack.end, "llm")
            await load.right(30)
            await house.restart("llm")
            await until(lambda: connections(stack.address))
            await load.right(30)
            await asyncio.to_thread(stack.end, replica)
            await load.right(30)
    finally:
        await asyncio.to_thread(stack.end, replica)
    assert load.tally.refused == 0, load.tally.retryable
