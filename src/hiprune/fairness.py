"""Queues in which one caller's flood does not hold up another: turns go round, in proportion to cost.

`FairQueue` is pure: items, whose they are and what they cost. `Turns` is a semaphore over one.

The order is start-time fair queueing (Goyal, Vin and Cheng, 1996): next is the owner whose items so far come
to the lowest cost, counted from when it began to ask. Who comes back goes on where its last item ends, also
where nothing of it waited meanwhile: else one item running and one waiting would be next for ever. With equal
costs that is round robin; an owner's own items stay in their order. A full queue gives up the newest items of
whoever has most in it, before it refuses an owner with less.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, Generic, TypeVar

from hiprune.errors import Exhausted

Item = TypeVar("Item")

MAX_ENDS: Final = 4096
"""Most owners of whom nothing waits and whose past is remembered; those with least of it are forgotten."""


class FairQueue(Generic[Item]):
    """Items that wait, by owner. Every method takes a time in proportion to the owners, few as they are."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[tuple[Item, int]]] = {}
        self._costs: dict[str, int] = {}
        self._starts: dict[str, int] = {}  # of each owner's next item, in cost served
        self._ends: dict[str, int] = {}  # of the last item of owners of whom none waits, where that is ahead
        self._now = 0
        self._count = 0

    def __len__(self) -> int:
        """Items that wait."""
        return self._count

    @property
    def cost(self) -> int:
        """Of all that wait."""
        return sum(self._costs.values())

    def push(self, owner: str, item: Item, cost: int) -> None:
        """Puts an item behind its owner's others, and behind what its owner has just had."""
        if owner not in self._lines:
            self._lines[owner], self._costs[owner] = deque(), 0
            self._starts[owner] = max(self._now, self._ends.pop(owner, 0))
        self._lines[owner].append((item, cost))
        self._costs[owner] += cost
        self._count += 1

    def charge(self, owner: str, cost: int) -> None:
        """Counts an owner's item that did not have to wait, while nothing of it waits."""
        self._now = max(self._now, self._ends.get(owner, 0))
        self._ends[owner] = self._now + cost
        self._forget_ends()

    def next_cost(self) -> int:
        """What the item that `pop` would give costs. Raises IndexError when nothing waits."""
        return self._lines[self._next()][0][1]

    def pop(self) -> Item:
        """The item whose turn it is. Raises IndexError when nothing waits."""
        owner = self._next()
        item, cost = self._lines[owner].popleft()
        self._now = self._starts[owner]
        self._starts[owner] += cost
        self._took(owner, cost)
        return item

    def rest(self) -> None:
        """Forgets what owners have had: for when nothing of anybody's is being worked on any more."""
        self._ends.clear()

    def remove(self, owner: str, item: Item) -> bool:
        """Takes an item out. False when it does not wait any more."""
        for entry in self._lines.get(owner, ()):
            if entry[0] == item:
                self._lines[owner].remove(entry)
                self._took(owner, entry[1])
                return True
        return False

    def discard(self, is_gone: Callable[[Item], bool]) -> None:
        """Takes out, at no cost to anybody, what `is_gone` says so of."""
        for owner, line in list(self._lines.items()):
            for item, _ in [entry for entry in line if is_gone(entry[0])]:
                self.remove(owner, item)

    def has_room(self, owner: str, cost: int, most: int) -> bool:
        """Whether `make_room` would let `cost` of an owner's in; nothing is taken out."""
        return self._victims(owner, cost, most) is not None

    def make_room(self, owner: str, cost: int, most: int) -> list[Item] | None:
        """Takes out as many newest items as let `cost` of an owner's in, and returns them.

        They are those of whoever has most waiting, and more than `owner` would have. None, and nothing is
        taken out, when that is not enough to stay within `most`.
        """
        victims = self._victims(owner, cost, most)
        if victims is None:
            return None
        return [self._drop_newest(rival) for rival, count in victims.items() for _ in range(count)]

    def _victims(self, owner: str, cost: int, most: int) -> dict[str, int] | None:
        """How many newest items of whom have to go for `cost` of an owner's; None where that is no use."""
        costs = dict(self._costs)
        mine, total = costs.pop(owner, 0) + cost, self.cost + cost
        victims: dict[str, int] = {}
        while total > most:
            rival = max(costs, key=costs.__getitem__, default=None)
            if rival is None or costs[rival] <= mine:
                return None
            victims[rival] = victims.get(rival, 0) + 1
            dropped = self._lines[rival][-victims[rival]][1]
            costs[rival] -= dropped
            total -= dropped
        return victims

    def _next(self) -> str:
        if not self._lines:
            raise IndexError("nothing waits")
        return min(self._lines, key=self._starts.__getitem__)

    def _drop_newest(self, owner: str) -> Item:
        item, cost = self._lines[owner].pop()
        self._took(owner, cost)
        return item

    def _took(self, owner: str, cost: int) -> None:
        self._costs[owner] -= cost
        self._count -= 1
        if not self._lines[owner]:
            self._ends[owner] = self._starts[owner]
            del self._lines[owner], self._costs[owner], self._starts[owner]
            self._forget_ends()

    def _forget_ends(self) -> None:
        """Only what lies ahead says who has had more than others; and of that, no more than is bounded."""
        self._ends = {owner: end for owner, end in self._ends.items() if end > self._now}
        if len(self._ends) > MAX_ENDS:
            del self._ends[min(self._ends, key=self._ends.__getitem__)]


class Turns:
    """At most `width` at a time, and at most `most` cost waiting. Belongs to one event loop.

    `refuse` makes the error for what finds no room, or has to make room for others.
    """

    def __init__(self, width: int, most: int, refuse: Callable[[], Exhausted]) -> None:
        self._width = width
        self._most = most
        self._refuse = refuse
        self._running = 0
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()

    @property
    def running(self) -> int:
        """How many have their turn."""
        return self._running

    @property
    def waiting(self) -> int:
        """How many wait for theirs."""
        return len(self._queue)

    @property
    def waiting_cost(self) -> int:
        """What those cost who wait."""
        return self._queue.cost

    async def acquire(self, owner: str, cost: int = 1) -> None:
        """Returns once it is an owner's turn, which lasts until `release`. Raises Exhausted."""
        if self._running < self._width:
            self._running += 1
            self._queue.charge(owner, cost)
        else:
            await self._wait(owner, cost)

    @asynccontextmanager
    async def take(self, owner: str, cost: int = 1) -> AsyncIterator[None]:
        """A turn of an owner's, for as long as the block lasts. Raises Exhausted."""
        await self.acquire(owner, cost)
        try:
            yield
        finally:
            self.release()

    async def _wait(self, owner: str, cost: int) -> None:
        pushed_out = self._queue.make_room(owner, cost, self._most)
        if pushed_out is None:
            raise self._refuse()
        for other in pushed_out:
            if not other.done():
                other.set_exception(self._refuse())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.push(owner, turn, cost)
        try:
            await turn
        except asyncio.CancelledError:
            if not self._queue.remove(owner, turn) and _is_given(turn):
                self.release()  # it came in the moment of leaving
            raise

    def release(self) -> None:
        """Gives a turn on to whoever is next."""
        while self._queue:
            turn = self._queue.pop()
            if not turn.done():  # its owner has left, and did not get to take it out yet
                turn.set_result(None)
                return
        self._running -= 1
        if not self._running:
            self._queue.rest()


def _is_given(turn: asyncio.Future[None]) -> bool:
    return turn.done() and not turn.cancelled() and turn.exception() is None
