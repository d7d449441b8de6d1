"""Single flight in this process: concurrent callers who want the same thing share one piece of work.

The work belongs to no caller: a cancelled leader does not fail its followers, and the work stops when the
last waiter leaves. Its deadline is the latest of those who wait.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from opentelemetry import trace
from opentelemetry.trace import SpanContext

from hiprune import telemetry
from hiprune.deadlines import Deadline
from hiprune.errors import Expired

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


@dataclass(slots=True)
class _Flight(Generic[Result]):
    task: asyncio.Task[Result]
    deadline: Deadline
    leader: SpanContext
    waiters: int = 0


class SingleFlight(Generic[Key, Result]):
    """Runs `work` at most once at a time for each key."""

    def __init__(self) -> None:
        self._flights: dict[Key, _Flight[Result]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def run(self, key: Key, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """The result of `work()` for `key`, shared with everybody who asks before it is done.

        Raises what the work raises, to each waiter.
        """
        flight = self._flights.get(key)
        if flight is None:
            # the leader's trace goes along, and its deadline until a follower brings a later one
            deadline = Deadline.current()
            context = contextvars.copy_context()
            context.run(deadline.enter)
            leader = trace.get_current_span().get_span_context()
            flight = _Flight(asyncio.create_task(_fly(work, deadline), context=context), deadline, leader)
            self._flights[key] = flight
            flight.task.add_done_callback(functools.partial(self._landed, key, flight))
        else:
            flight.deadline.extend(Deadline.current())
            telemetry.count("hiprune.cache.joins", scope="process")
            telemetry.link(flight.leader)
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.task.done():
                # gone from the table at once: a newcomer must not join work that is being cancelled
                self._forget(key, flight)
                flight.task.cancel()

    def _landed(self, key: Key, flight: _Flight[Result], task: asyncio.Task[Result]) -> None:
        """The work is over, well or not."""
        self._forget(key, flight)
        if not task.cancelled():
            task.exception()  # the waiters have it; with none left, asyncio would report it as never seen

    def _forget(self, key: Key, flight: _Flight[Result]) -> None:
        """Takes a flight off the table, unless another has taken its place."""
        if self._flights.get(key) is flight:
            del self._flights[key]


async def _fly(work: Callable[[], Coroutine[Any, Any, Result]], deadline: Deadline) -> Result:
    """Does the work; and again if its time was up and somebody has come meanwhile who has more.

    What it asked of another service went there under the deadline of then, and cannot be given more.
    """
    while True:
        given_s = deadline.at_s
        try:
            return await work()
        except Expired:
            if deadline.at_s <= given_s:
                raise
