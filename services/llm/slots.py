"""Who may generate now: a bounded number at a time, a bounded number waiting, tenants in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from hiprune import auth, telemetry
from hiprune.errors import Exhausted
from hiprune.fairness import Turns
from hiprune.telemetry import stage

RETRY_AFTER_S: Final = 1.0


class Slots:
    """`async with slots.take(): …` around all the work of one answer."""

    def __init__(self, concurrency: int, queue: int) -> None:
        self._turns = Turns(concurrency, queue, self._full)
        self._queue = queue
        telemetry.watch("hiprune.queue.depth", lambda: self._turns.waiting, queue="slots")
        telemetry.measure("hiprune.queue.limit", queue, queue="slots")
        telemetry.watch("hiprune.running", lambda: self._turns.running, pool="slots")
        telemetry.measure("hiprune.running.limit", concurrency, pool="slots")

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self._turns.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._turns.waiting

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Holds one slot. Raises Exhausted (OVERLOADED) when too many wait already."""
        async with AsyncExitStack() as held:
            with stage("queue"):
                await held.enter_async_context(self._turns.take(auth.current().tenant.name))
            yield

    def _full(self) -> Exhausted:
        return Exhausted(
            f"{self._turns.waiting} requests wait for the language model, at most {self._queue} may",
            retry_after_s=RETRY_AFTER_S,
        )
