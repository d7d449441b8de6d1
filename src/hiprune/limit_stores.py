"""Where limits are counted: in Redis for all replicas together, or in this process.

The window is a sliding one: what was used in the minute before counts with the part of it that is less than
a minute ago, so that no burst at the turn of a minute gets twice the limit. It is kept by the `limits`
package. Knows keys and numbers; knows no tenant.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from hiprune.config import ConfigError

if TYPE_CHECKING:
    from limits.aio.storage import MemoryStorage, RedisStorage

log = logging.getLogger("hiprune.quotas")

WINDOW_S: Final = 60
CONNECT_S: Final = 1.0
"""Longer than any operation may take, and so bounds none: it would count the lateness of this process too."""
MAX_CONNECTIONS: Final = 1024

Result = TypeVar("Result")

_PREFIX: Final = "hiprune:v1:limits"

# Members are requests, scores the milliseconds at which they are given up for lost, as when a replica dies.
_ENTER: Final = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then
    return 0
end
redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[2])
local last = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')
redis.call('PEXPIREAT', KEYS[1], last[2])
return 1
"""


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding window's two counters, as `limits` reads them."""

    previous: int
    previous_left_s: float
    """Until nothing of the previous minute counts any more."""
    current: int
    current_left_s: float
    """Until nothing of this minute counts any more: it becomes the previous one a minute before that."""

    def free_in_s(self, limit: int, cost: int) -> float:
        """Seconds until `cost`, which is at most `limit`, fits, if nobody uses more meanwhile."""
        room = limit - cost - self.current
        if room >= 0:
            return _fade_s(self.previous, self.previous_left_s, room)
        # nothing of this minute fades before it is over
        turn_s = max(0.0, self.current_left_s - WINDOW_S)
        return max(turn_s, _fade_s(self.current, self.current_left_s, limit - cost))


def _fade_s(count: int, left_s: float, room: int) -> float:
    """Seconds until no more than `room` is left of `count`, of which nothing is in `left_s`.

    A minute takes all of it away, evenly; what is left is rounded down, so that below `room + 1` is enough.
    """
    if count <= room:
        return 0.0
    return max(0.0, left_s - (room + 1) * WINDOW_S / count) + 0.001  # the bound itself is still too much


class Store(Protocol):
    """Where counts live."""

    async def take(self, key: str, limit: int, cost: int) -> float | None:
        """None once `cost` is counted; where it does not fit, the seconds until it does."""

    async def wait_s(self, key: str, limit: int, cost: int) -> float:
        """Seconds until `cost` would fit; 0 where it does. Counts nothing."""

    async def give_back(self, key: str, limit: int, cost: int) -> None:
        """Uncounts what was taken less than a window ago, as far as this window holds as much."""

    async def enter(self, key: str, limit: int, ticket: str, lease_s: float) -> bool:
        """Whether there was room for one more at a time. Its ticket holds the place, for so long at most."""

    async def leave(self, key: str, *tickets: str) -> None:
        """Gives places back."""

    async def close(self) -> None:
        """Frees connections."""


class _Windows:
    """The part of a store that `limits` does, in either of its storages."""

    def __init__(self, storage: MemoryStorage | RedisStorage) -> None:
        self._storage = storage
        self._giving = asyncio.Lock()

    async def take(self, key: str, limit: int, cost: int) -> float | None:
        if await self._storage.acquire_sliding_window_entry(key, limit, WINDOW_S, cost):
            return None
        return await self.wait_s(key, limit, cost)

    async def wait_s(self, key: str, limit: int, cost: int) -> float:
        return Window(*await self._storage.get_sliding_window(key, WINDOW_S)).free_in_s(limit, cost)

    async def give_back(self, key: str, limit: int, cost: int) -> None:
        # what was taken in the window before fades by itself: given back here it would become credit, which
        # adds up from one turn of the minute to the next
        async with self._giving:
            window = Window(*await self._storage.get_sliding_window(key, WINDOW_S))
            if (back := min(cost, window.current)) > 0:
                await self._storage.acquire_sliding_window_entry(key, limit, WINDOW_S, -back)


class ProcessStore(_Windows):
    """Counts of this process."""

    def __init__(self) -> None:
        from limits.aio.storage import MemoryStorage

        super().__init__(MemoryStorage())
        self._inside: dict[str, set[str]] = {}

    async def enter(self, key: str, limit: int, ticket: str, lease_s: float) -> bool:
        """Needs no lease: a process that dies takes its counts along."""
        inside = self._inside.setdefault(key, set())
        if len(inside) >= limit:
            return False
        inside.add(ticket)
        return True

    async def leave(self, key: str, *tickets: str) -> None:
        """Gives places back."""
        inside = self._inside.get(key, set())
        inside.difference_update(tickets)
        if not inside:
            self._inside.pop(key, None)

    async def close(self) -> None:
        """Nothing."""


class RedisStore(_Windows):
    """Counts that all replicas share. Raises what the Redis client raises."""

    def __init__(self, url: str) -> None:
        """Connects when first used. Raises ConfigError for a URL that is none."""
        from limits.aio.storage import RedisStorage

        from hiprune.redis_clients import EXPECTED, open_client

        try:
            client: Any = open_client(url, connect_timeout_s=CONNECT_S, max_connections=MAX_CONNECTIONS)
        except (ValueError, TypeError):
            raise ConfigError(
                f"limits_redis_url (--limits-redis-url): got a secret, expected {EXPECTED}"
            ) from None  # the cause holds parts of the URL, and so of its password
        storage = RedisStorage("redis://", implementation="redispy", key_prefix=_PREFIX)
        # its own client would know fewer kinds of URL than the rest of the service does
        bridge: Any = storage.bridge
        bridge.connection_getter = lambda readonly: client
        bridge.register_scripts()
        super().__init__(storage)
        self._redis = client
        self._enter = client.register_script(_ENTER)

    async def take(self, key: str, limit: int, cost: int) -> float | None:
        """A counter that is no number begins anew: nothing else would ever mend it."""
        return await self._mending(
            lambda: super(RedisStore, self).take(key, limit, cost),
            lambda: self._storage.clear_sliding_window(key, WINDOW_S),
        )

    async def wait_s(self, key: str, limit: int, cost: int) -> float:
        """As `take`."""
        return await self._mending(
            lambda: super(RedisStore, self).wait_s(key, limit, cost),
            lambda: self._storage.clear_sliding_window(key, WINDOW_S),
        )

    async def enter(self, key: str, limit: int, ticket: str, lease_s: float) -> bool:
        """The place is free again after the lease, should nobody give it back."""
        arguments = [limit, ticket, math.ceil(lease_s * 1000)]
        name = f"{_PREFIX}:{key}"

        async def enter() -> bool:
            return bool(await self._enter(keys=[name], args=arguments))

        return await self._mending(enter, lambda: self._redis.delete(name))

    async def leave(self, key: str, *tickets: str) -> None:
        """Gives places back."""
        name = f"{_PREFIX}:{key}"
        await self._mending(lambda: self._redis.zrem(name, *tickets), lambda: self._redis.delete(name))

    @staticmethod
    async def _mending(
        work: Callable[[], Awaitable[Result]], mend: Callable[[], Awaitable[object]]
    ) -> Result:
        """The work's answer: at the second try where its key held what none of ours writes there."""
        from redis.exceptions import ResponseError

        from hiprune.redis_clients import is_wrong_type

        try:
            return await work()
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
        log.warning("a limit's counter held no count, and begins anew")
        await mend()
        return await work()

    async def close(self) -> None:
        """Closes the connections."""
        from hiprune.redis_clients import close_client

        await close_client(self._redis)
