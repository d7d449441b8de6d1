"""Micro-batches: requests that arrive together share one run of the model.

One worker thread runs batches, one after the other; while one runs, the next gathers. Owners take turns, and
each one's items go in order of arrival, so that nobody's flood holds up another (`hiprune.fairness`).
Knows neither images nor models: an item is anything with a cost, and a batch is a list of items.

Belongs to one event loop, that of its first `submit`; nothing here is locked, as only that loop touches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from hiprune.errors import Exhausted, Unavailable
from hiprune.fairness import FairQueue

log = logging.getLogger("hiprune.encoder")

Item = TypeVar("Item")
Result = TypeVar("Result")

_FIRST_GUESS_S: Final = 1.0
"""How long a batch is taken to run before one has."""

_SMOOTHING: Final = 0.3
"""Weight of the latest batch in the running mean of batch times: about the last five count."""


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """A result, and what it took."""

    result: Result
    started_s: float  # when its batch did, by time.perf_counter
    queued_s: float  # from submit to the start of its batch
    ran_s: float  # of the whole batch
    batch_size: int  # items


@dataclass(eq=False)
class _Job(Generic[Item, Result]):
    item: Item
    cost: int
    future: asyncio.Future[Outcome[Result]]
    on_start: Callable[[], None] | None
    submitted_s: float = field(default_factory=time.perf_counter)


class MicroBatcher(Generic[Item, Result]):
    """A bounded queue in front of `run`, which takes a list of items and returns their results in order.

    `cost` is in whatever `unit` bounds the model's memory and time (images, tokens), and so are the bounds:
    a batch costs at most `max_batch_cost`, or is one item that is dearer; items that wait cost at most
    `max_queue_cost`, or are one item that found nobody waiting. Items that find the worker idle wait up to
    `max_wait_ms` for company, less once a batch is full; 0 takes only what the event loop has ready. When the
    queue is full, the newest items of the owner with most in it make room for one with less.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], list[Result]],
        *,
        cost: Callable[[Item], int],
        max_batch_cost: int,
        max_queue_cost: int,
        max_wait_ms: float = 2.0,
        unit: str = "items",
    ) -> None:
        self._run = run
        self._cost = cost
        self._max_batch_cost = max_batch_cost
        self._max_queue_cost = max_queue_cost
        self._max_wait_s = max_wait_ms / 1000
        self._unit = unit
        self._waiting: FairQueue[_Job[Item, Result]] = FairQueue()
        self._enough = asyncio.Event()  # no more company is needed
        self._pump: asyncio.Task[None] | None = None  # runs while there is work
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._batch_s = _FIRST_GUESS_S
        self._closed = False

    @property
    def depth(self) -> int:
        """The cost of what waits; a running batch waits no more."""
        return self._waiting.cost

    async def submit(
        self, item: Item, owner: str = "", *, on_start: Callable[[], None] | None = None
    ) -> Outcome[Result]:
        """The outcome of an owner's `item`, once its batch has run; `on_start` is called when that starts.

        A batch that fails starts again, item by item.

        Raises `Exhausted` (OVERLOADED) when the queue is full, or when the item has to make room in it;
        `Unavailable` after `close`; and whatever `run` raised for the item alone. Cancelled before its batch
        starts, an item never reaches `run`; later, its result is dropped.
        """
        cost = self._cost(item)
        self.check_room(owner, cost)
        if self._waiting:
            self._make_room(owner, cost)
        job: _Job[Item, Result] = _Job(item, cost, asyncio.get_running_loop().create_future(), on_start)
        self._waiting.push(owner, job, cost)
        if self._pump is None:
            self._enough.clear()
            self._pump = asyncio.create_task(self._run_until_empty())
        if self.depth >= self._max_batch_cost:
            self._enough.set()
        try:
            return await job.future
        except asyncio.CancelledError:
            self._waiting.remove(owner, job)  # if its batch has not started
            raise

    def check_room(self, owner: str = "", cost: int = 1) -> None:
        """Whether `submit` would take an owner's item now: for before there is one. Raises as it does."""
        if self._closed:
            raise Unavailable("shutting down")
        if self._waiting and not self._waiting.has_room(owner, cost, self._max_queue_cost):
            raise self._refusal(f"{cost} more")

    def _make_room(self, owner: str, cost: int) -> None:
        """Pushes others' newest items out where they are what is in the way."""
        depth = self.depth
        for job in self._waiting.make_room(owner, cost, self._max_queue_cost) or ():
            if not job.future.done():
                job.future.set_exception(self._refusal(f"{job.cost} of these made room for others", depth))

    def _refusal(self, what: str, depth: int | None = None) -> Exhausted:
        depth = self.depth if depth is None else depth
        return Exhausted(
            f"the queue is full: {depth} {self._unit} wait, {what}; at most {self._max_queue_cost}",
            retry_after_s=self._batch_s * math.ceil(depth / self._max_batch_cost),
        )

    async def close(self) -> None:
        """Refuse what comes, finish what is here. Cancelled, it may be called again."""
        self._closed = True
        self._enough.set()
        if self._pump is not None:
            await asyncio.wait({self._pump})  # which, unlike awaiting it, leaves it alone if we are cancelled
        self._worker.shutdown(wait=False)

    async def _run_until_empty(self) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._max_wait_s):
                    await self._enough.wait()
            while self._waiting:
                batch = self._take()
                if batch and not await self._run_batch(batch):
                    # nobody fails for another's sake, or because all of them together were too much
                    for job in batch:
                        if not job.future.done():
                            await self._run_batch([job])
        finally:
            self._waiting.rest()
            self._pump = None

    def _take(self) -> list[_Job[Item, Result]]:
        """The next batch: nothing overtakes an item that does not fit, or it might never be its turn."""
        batch: list[_Job[Item, Result]] = []
        room = self._max_batch_cost
        # who has left, and did not get to take its item out yet
        self._waiting.discard(lambda job: job.future.done())
        while self._waiting and (not batch or self._waiting.next_cost() <= room):
            job = self._waiting.pop()
            batch.append(job)
            room -= job.cost
        return batch

    async def _run_batch(self, batch: list[_Job[Item, Result]]) -> bool:
        """Run one batch and answer everyone in it; errors go to the submitters and end there.

        False, and nobody is answered, where several fail together.
        """
        started_s = time.perf_counter()
        for job in batch:
            if job.on_start is not None:
                job.on_start()
        try:
            items = [job.item for job in batch]
            results = await asyncio.get_running_loop().run_in_executor(self._worker, self._checked_run, items)
        except BaseException as error:
            if isinstance(error, Exception) and len(batch) > 1:
                log.warning("a batch of %d is run again, one by one: %s", len(batch), str(error))
                return False
            for job in batch:
                if not job.future.done():
                    job.future.set_exception(error)
            if not isinstance(error, Exception):  # our task is cancelled: the loop is going down
                raise
            return True
        ran_s = time.perf_counter() - started_s
        self._batch_s += _SMOOTHING * (ran_s - self._batch_s)
        for job, result in zip(batch, results, strict=True):
            if not job.future.done():
                queued_s = started_s - job.submitted_s
                job.future.set_result(Outcome(result, started_s, queued_s, ran_s, len(batch)))
        return True

    def _checked_run(self, items: list[Item]) -> list[Result]:
        """`run`, on the worker thread, held to its contract."""
        try:
            results = self._run(items)
        except StopIteration as error:  # which a future cannot carry: its waiters would wait for ever
            raise RuntimeError("run raised StopIteration") from error
        if len(results) != len(items):
            raise RuntimeError(f"{len(results)} results for a batch of {len(items)}")
        return results
