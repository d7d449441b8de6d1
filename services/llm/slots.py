"""Who may generate now: a bounded number at a time, a bounded number waiting, first come first served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from hiprune.errors import Exhausted
from hiprune.telemetry import stage

RETRY_AFTER_S: Final = 1.0


class Slots:
    """`async with slots.take(): …` around all the work of one answer."""

    def __init__(self, concurrency: int, queue: int) -> None:
        self._free = asyncio.Semaphore(concurrency)
        self._queue = queue
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._waiting

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Holds one slot. Raises Exhausted (OVERLOADED) when too many wait already."""
        if self._free.locked() and self._waiting >= self._queue:
            raise Exhausted(
                f"{self._waiting} requests wait for the language model, at most {self._queue} may",
                retry_after_s=RETRY_AFTER_S,
            )
        self._waiting += 1
        try:
            with stage("queue"):
                await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._free.release()
