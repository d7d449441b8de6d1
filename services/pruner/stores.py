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
from redis.exceptions import RedisError

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

    def __init__(self, url: str, *, ttl_s: int, timeout_s: float) -> None:
        self._redis = redis.Redis.from_url(
            url,
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),  # a retry would spend the budget twice; the breaker tries again
        )
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._failures = 0
        self._closed_again_at = 0.0

    async def get(self, key: bytes) -> bytes | None:
        """The value, or None: also when Redis is slow or down."""
        value = await self._guarded(self._redis.get(key))
        return value if isinstance(value, bytes) else None

    async def put(self, key: bytes, value: bytes) -> None:
        """Stores a value, or does nothing: also when Redis is slow, down or full."""
        await self._guarded(self._redis.set(key, value, ex=self._ttl_s))

    async def delete(self, key: bytes) -> None:
        """Forgets a value, if Redis can be reached; its time to live does the rest."""
        await self._guarded(self._redis.delete(key))

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.aclose()

    async def _guarded(self, operation: Awaitable[Answer]) -> Answer | None:
        """The operation's answer within the budget, else None. An open breaker answers None at once."""
        if time.monotonic() < self._closed_again_at:
            if asyncio.iscoroutine(operation):
                operation.close()
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await operation
        except (RedisError, OSError, TimeoutError) as error:
            self._failures += 1
            if self._failures >= self.FAILURES_TO_OPEN:
                # one probe is let through when the pause is over; its failure opens the breaker again
                self._closed_again_at = time.monotonic() + self.OPEN_S
            if self._failures == self.FAILURES_TO_OPEN:
                log.warning("Redis fails (%s): every lookup is a miss until it answers", type(error).__name__)
            return None
        if self._failures >= self.FAILURES_TO_OPEN:
            log.warning("Redis answers again")
        self._failures = 0
        return answer
