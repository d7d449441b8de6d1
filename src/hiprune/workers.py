"""Threads at which tenants take turns: for work that would hold up the event loop, and everybody with it.

Knows whose the current request is; knows nothing of the work. Cancelled, work that has not begun never does;
what has begun goes on to its end, or to where it looks whether anybody still wants it, and has its turn for
as long: nobody else's work waits behind it unseen.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from hiprune import auth, telemetry
from hiprune.errors import Exhausted
from hiprune.fairness import Turns

Result = TypeVar("Result")


class Abandoned(Exception):
    """Raised by work that has looked and found nobody who wants its result."""


class Workers:
    """A few threads, and a queue before them in which one tenant's flood does not hold up another."""

    def __init__(self, threads: int, name: str, *, waiting_for: str, max_waiting: int) -> None:
        """`max_waiting` bounds the cost of all that waits; `waiting_for` ends "17 requests wait …"."""
        self._name = name
        self._waiting_for = waiting_for
        self._max_waiting = max_waiting
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._turns = Turns(threads, max_waiting, self._full)

    def watch(self) -> None:
        """Shows what waits to whoever reads metrics."""
        telemetry.watch("hiprune.queue.depth", lambda: self._turns.waiting_cost, queue=self._name)
        telemetry.measure("hiprune.queue.limit", self._max_waiting, queue=self._name)

    @property
    def waiting(self) -> int:
        """How much work waits for its turn."""
        return self._turns.waiting

    async def run(
        self, work: Callable[[], Result], cost: int = 1, *, check: Callable[[], None] = lambda: None
    ) -> Result:
        """The result of `work()`, once it is the current tenant's turn. Raises Exhausted, as `work`.

        `check` raises, on the event loop, where the work is of no use: before it waits, and at its turn.
        """
        check()
        await self._turns.acquire(auth.current().tenant.name, cost)
        loop = asyncio.get_running_loop()

        def release(_: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it all turns
                loop.call_soon_threadsafe(self._turns.release)

        try:
            check()
            running = self._threads.submit(work)
        except Exception:  # also what `submit` raises after `close`
            self._turns.release()
            raise
        result = asyncio.wrap_future(running)
        # by the thread's own end, and not by ours, as we may be cancelled before; and behind the result, so
        # that what its owner does with it at once is done before the next one's `check`
        running.add_done_callback(release)
        return await result

    async def run_wanted(
        self,
        work: Callable[[Callable[[], bool]], Result],
        cost: int = 1,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> Result:
        """As `run`, of work that is given a way to ask whether its result is still wanted."""
        left = threading.Event()
        try:
            return await self.run(lambda: work(lambda: not left.is_set()), cost, check=check)
        finally:
            left.set()

    def close(self) -> None:
        """Lets the threads go once they are done."""
        self._threads.shutdown(wait=False)

    def _full(self) -> Exhausted:
        return Exhausted(
            f"{self._turns.waiting} requests wait {self._waiting_for}, at a cost of at most "
            f"{self._max_waiting} together",
            retry_after_s=1,
        )
