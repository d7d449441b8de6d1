"""Where cache values live: this process, or Redis. A store never fails a request: trouble is a miss.

Knows keys and bytes; knows no tenant and no image.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Final, Protocol, TypeVar

from cachetools import TTLCache
from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

log = logging.getLogger("hiprune.pruner.stores")

Answer = TypeVar("Answer")


class Store(Protocol):
    """Keys to values with a time to live. No method raises; an unreachable store knows nothing."""

    @property
    def name(self) -> str:
        """What `cache` names it."""

    async def get(self, key: bytes) -> bytes | None:
        """The value, or None."""

    async def put(self, key: bytes, value: bytes) -> None:
        """Stores a value, or does nothing."""

    async def delete(self, key: bytes) -> None:
        """Forgets a value, if there is one."""

    async def close(self) -> None:
        """Frees connections."""


class NoStore:
    """No cache: every lookup is a miss."""

    name = "off"

    async def get(self, key: bytes) -> bytes | None:
        """None."""
        return None

    async def put(self, key: bytes, value: bytes) -> None:
        """Nothing."""

    async def delete(self, key: bytes) -> None:
        """Nothing."""

    async def close(self) -> None:
        """Nothing."""


class MemoryStore:
    """An in-process store bounded in bytes; the least recently used value goes first."""

    name = "memory"

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self._values: TTLCache[bytes, bytes] = TTLCache(max_bytes, ttl_s, getsizeof=len)

    async def get(self, key: bytes) -> bytes | None:
        """The value, or None."""
        return self._values.get(key)

    async def put(self, key: bytes, value: bytes) -> None:
        """Stores a value; one larger than the whole store is left out."""
        if len(value) <= self._values.maxsize:
            self._values[key] = value

    async def delete(self, key: bytes) -> None:
        """Forgets a value, if there is one."""
        self._values.pop(key, None)

    async def close(self) -> None:
        """Forgets everything."""
        self._values.clear()


class RedisStore:
    """A shared store. Each operation has a short budget; after repeated failures Redis is left alone."""

    name = "redis"

    FAILURES_TO_OPEN: Final = 3
    OPEN_S: Final = 2.0
    WARN_EVERY_S: Final = 60.0
    MAX_CONNECTIONS: Final = 16

    def __init__(self, url: str, *, ttl_s: int, timeout_s: float) -> None:
        """Connects when first used. Raises ValueError or TypeError for a URL that is none."""
        # blocking: a rush of requests waits for a connection, inside its budget, and is no failure of Redis
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=self.MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),  # a retry would spend the budget twice; the breaker tries again
        )
        # connects nowhere; a wrong option in the URL shows here and not in a request
        pool.make_connection()  # type: ignore[no-untyped-call]
        self._redis = redis.Redis.from_pool(pool)
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._failures = 0
        self._open_until = 0.0
        self._warn_from = 0.0

    async def get(self, key: bytes) -> bytes | None:
        """The value, or None: also when Redis is slow or down."""
        value = await self._guarded(self._redis.get(key), counts=True)
        return value if isinstance(value, bytes) else None

    async def put(self, key: bytes, value: bytes) -> None:
        """Stores a value, or does nothing: also when Redis is slow, down or full.

        Failing is not held against Redis: the value may be too large for the budget, or the memory full,
        and reads go well. The read before every write says how Redis is.
        """
        await self._guarded(self._redis.set(key, value, ex=self._ttl_s), counts=False)

    async def delete(self, key: bytes) -> None:
        """Forgets a value, if Redis can be reached; its time to live does the rest."""
        await self._guarded(self._redis.delete(key), counts=True)

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.aclose()

    async def _guarded(self, operation: Awaitable[Answer], *, counts: bool) -> Answer | None:
        """The operation's answer within the budget, else None. An open breaker answers None at once."""
        now = time.monotonic()
        if now < self._open_until:
            if asyncio.iscoroutine(operation):
                operation.close()
            return None
        if self._failures >= self.FAILURES_TO_OPEN:
            self._open_until = now + self.OPEN_S  # this one is the probe; the others wait for its answer
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await operation
        except (RedisError, OSError, TimeoutError) as error:
            if counts:
                self._failed(error)
            elif isinstance(error, ResponseError) and now >= self._warn_from:
                self._warn_from = now + self.WARN_EVERY_S
                log.warning("Redis refuses to store (%s): what is not there yet stays a miss", error)
            return None
        if self._failures >= self.FAILURES_TO_OPEN:
            log.warning("Redis answers again")
        self._failures, self._open_until = 0, 0.0
        return answer

    def _failed(self, error: Exception) -> None:
        """Counts a failure; the third in a row opens the breaker."""
        self._failures += 1
        if self._failures >= self.FAILURES_TO_OPEN:
            self._open_until = time.monotonic() + self.OPEN_S
        if self._failures == self.FAILURES_TO_OPEN:
            log.warning("Redis fails (%s): every lookup is a miss until it answers", type(error).__name__)
