"""Claims about a slow and a broken network between the services: deadlines hold, and it mends by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from hiprune.client import Client
from hiprune.stack import Stack
from tests.chaos.conftest import Counting
from tests.chaos.load import Judge, Load, asks, until
from tests.chaos.proxy import SlowProxy

pytestmark = pytest.mark.extra

SHORT_S = 2.0
"""A deadline that ends while nothing gets through."""


@dataclass
class Wires:
    """A stack whose services reach each other through proxies."""

    stack: Stack
    judge: Judge
    to_pruner: SlowProxy
    to_encoder: SlowProxy
    counting: Counting

    def load(self, **options: object) -> Load:
        """Clients whose requests count."""
        return self.counting.add(Load(self.stack.address, self.judge, **options))

    def proxy(self, name: str) -> SlowProxy:
        """The one in front of a service."""
        return {"pruner": self.to_pruner, "encoder": self.to_encoder}[name]


@pytest.fixture(scope="module")
async def wired() -> AsyncIterator[tuple[Stack, Judge, SlowProxy, SlowProxy]]:
    """Redis and the three services over TCP, proxies between them."""
    stack = Stack(tcp=True)
    async with AsyncExitStack() as opened:
        to_pruner = await opened.enter_async_context(SlowProxy(stack.pruner_address))
        to_encoder = await opened.enter_async_context(SlowProxy(stack.encoder_address))
        stack.set_environ(HIPRUNE_LLM_PRUNER=to_pruner.address, HIPRUNE_PRUNER_ENCODER=to_encoder.address)
        with stack:
            async with Client(stack.address) as client:
                judge = await Judge.of(client, asks(pictures=4))
            yield stack, judge, to_pruner, to_encoder


@pytest.fixture
def wires(wired: tuple[Stack, Judge, SlowProxy, SlowProxy], counting: Counting) -> Wires:
    """The same, and where requests are counted."""
    return Wires(*wired, counting)


async def test_a_slow_network_costs_time_and_no_answer(wires):
    wires.to_pruner.delay_s = wires.to_encoder.delay_s = 0.2
    try:
        async with wires.load() as load:
            await load.right(60)
    finally:
        wires.to_pruner.delay_s = wires.to_encoder.delay_s = 0.0
    assert load.tally.refused == 0


@pytest.mark.parametrize("name", ["pruner", "encoder"])
async def test_where_nothing_gets_through_deadlines_hold_and_it_goes_on_when_it_does(wires, name):
    async with wires.load(deadline_s=SHORT_S) as load:
        await load.right(30)
        wires.proxy(name).hold()
        try:
            await until(lambda: load.tally.refused >= 6)
        finally:
            wires.proxy(name).release()
        await load.right(60)
    assert set(load.tally.retryable) == {"DEADLINE_EXCEEDED DEADLINE_EXCEEDED"}, load.tally.retryable


async def test_connections_that_lead_nowhere_any_more_are_left_for_others(wires):
    async with wires.load(deadline_s=SHORT_S) as load:
        await load.right(30)
        wires.to_pruner.strand()
        wires.to_encoder.strand()
        await until(lambda: load.tally.refused >= 6)
        await load.right(60)
    wires.to_pruner.bury()
    wires.to_encoder.bury()
