"""A store that pruners share: Redis. Slow, full or gone, it costs a short while and never a request.

- Every operation of a request moves at most a chunk, and has the same short budget: a value of tens of MB is
  read in many of them, so that neither its size nor a slow network is mistaken for a Redis that hangs.
- After failures in a row Redis is left alone for a while, then one operation tries again.
- What an owner holds is counted beside its entries, by the script that stores them: see `_STORE`.

Knows keys and bytes; knows no tenant and no image.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

from redis.exceptions import RedisError, ResponseError

from hiprune import lateness, telemetry
from hiprune.redis_clients import close_client, is_wrong_type, open_client
from services.pruner.stores import Claims

log = logging.getLogger("hiprune.pruner.stores")

Answer = TypeVar("Answer")

CHUNK_BYTES: Final = 2 * 2**20
"""Most that one operation moves: 40 ms at a gigabit a second, and a millisecond of this process's time."""

_STORE: Final = """
-- Stores a value and makes room for it in its owner's share.
-- KEYS: entry, the owner's entries by last use, their sizes, and the value if it came in parts
-- ARGV: seconds to live, bytes of the value, bytes of the share, and the value if it did not
local entry, uses, sizes, parts = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ttl, size, share = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
-- the value first: a full Redis refuses a script's first write, and lets later ones pass
if parts then
  redis.call('RENAME', parts, entry)
  redis.call('EXPIRE', entry, ttl)
else
  redis.call('SET', entry, ARGV[4], 'EX', ttl)
end
local function forget(key)
  local held = redis.call('HGET', sizes, key)
  if held then
    redis.call('HDEL', sizes, key)
    redis.call('ZREM', uses, key)
    redis.call('HINCRBY', sizes, '', -held)
  end
end
local function kind(key)
  return redis.call('TYPE', key).ok
end
-- one half of the books was evicted, or somebody wrote over it: they begin anew, and what they forget expires
-- on its own
if kind(uses) ~= 'zset' or kind(sizes) ~= 'hash'
    or redis.call('HLEN', sizes) ~= redis.call('ZCARD', uses) + 1 then
  redis.call('UNLINK', uses, sizes)
end
forget(entry)
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local looks = 0
while tonumber(redis.call('HGET', sizes, '') or 0) + size > share do
  local first = redis.call('ZRANGE', uses, 0, 0, 'WITHSCORES')
  if #first == 0 then break end
  -- reads leave the books alone; what was read since goes back to its place when its turn comes
  local idle = redis.pcall('OBJECT', 'IDLETIME', first[1])
  if type(idle) == 'number' and now - idle > tonumber(first[2]) + 2 and looks < 256 then  -- idle: to a second
    redis.call('ZADD', uses, string.format('%.6f', now - idle), first[1])
    looks = looks + 1
  else
    redis.call('UNLINK', first[1])
    forget(first[1])
  end
end
redis.call('ZADD', uses, string.format('%.6f', now), entry)
redis.call('HSET', sizes, entry, size)
redis.call('HINCRBY', sizes, '', size)
redis.call('EXPIRE', uses, ttl)
redis.call('EXPIRE', sizes, ttl)
return 1
"""

_RENEW: Final = """
return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('PEXPIRE', KEYS[1], ARGV[2]) or 0
"""

_NEVER: Final = -1
"""What PTTL says of a key that has no time to live."""
_GONE: Final = -2
"""And of one that is not there."""

_RELEASE: Final = """
return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('DEL', KEYS[1]) or 0
"""


_DELETE: Final = """
return redis.call('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) == ARGV[1] and redis.call('UNLINK', KEYS[1]) or 0
"""
_BEGINNING: Final = 64
"""Bytes that tell a value from one in its place: each begins with a random number and a checksum."""


class RedisStore:
    """A shared store, by the URL that `hiprune.redis_clients` knows."""

    name = "redis"

    FAILURES_TO_OPEN: Final = 3
    OPEN_S: Final = 2.0
    WARN_EVERY_S: Final = 60.0
    MAX_CONNECTIONS: Final = 16
    MAX_PUTS: Final = 4
    """Values on their way at a time: the other connections are for those who wait for an answer."""
    PUT_S: Final = 1.0
    PUT_S_PER_MB: Final = 0.02
    """What a put may take, behind the answer: nobody waits for it."""
    PARTS_TTL_S: Final = 60
    """When the parts of a value that was never finished go."""
    OVERDUE_S: Final = 2.0
    """How long an operation goes on when nobody waits any more: a connection being made gets made."""

    def __init__(
        self,
        url: str,
        *,
        ttl_s: int,
        timeout_s: float,
        share_bytes: int = 2**40,
        max_value_bytes: int = 2**29,
    ) -> None:
        """Connects when first used. Raises ValueError or TypeError for a URL that is none."""
        self._redis = open_client(
            url, connect_timeout_s=self.OVERDUE_S / 2, max_connections=self.MAX_CONNECTIONS
        )
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._share_bytes = share_bytes
        self._max_value_bytes = max_value_bytes
        # a rush of requests waits for its turn, inside its budget, and is no failure of Redis
        self._turns = asyncio.Semaphore(self.MAX_CONNECTIONS)
        self._puts = asyncio.Semaphore(self.MAX_PUTS)
        self._running: set[asyncio.Task[Any]] = set()
        self._breaker = Breaker(self.FAILURES_TO_OPEN, self.OPEN_S)
        self._warn_from = 0.0

    @property
    def claims(self) -> Claims:
        """Itself."""
        return self

    async def get(self, key: bytes) -> bytes | bytearray | None:
        """The value, or None: also when Redis is slow or down, and for one larger than any that is stored.

        One round trip for each chunk. A value that is replaced meanwhile comes out mixed, which its checksum
        tells; one that goes meanwhile is None.
        """
        whole = bytearray()
        for begin in range(0, self._max_value_bytes + CHUNK_BYTES, CHUNK_BYTES):
            part = await self._part(key, begin)
            if part is None:
                return None
            if len(part) < CHUNK_BYTES and not whole:
                return part or None
            whole += part
            if not part and await self._read("PTTL", key) in (None, _GONE):
                return None  # not the end of so many whole chunks: it ran out, or was evicted
            if len(part) < CHUNK_BYTES:
                return whole
        return None

    async def put(self, key: bytes, value: bytes, *, owner: bytes) -> bool:
        """Stores a value unless Redis is slow, down or full, or it is larger than a share; whether it did.

        Failing is not held against Redis: the value may be too large for the budget, or the memory full,
        and reads go well. The read before every write says how Redis is.
        """
        if len(value) > min(self._share_bytes, self._max_value_bytes):
            return False
        budget_s = self.PUT_S + self.PUT_S_PER_MB * len(value) / 2**20
        async with self._puts:
            stored = await self._within(
                budget_s, lambda: self._store(key, value, owner), counts=False, overdue_s=0
            )
        return stored is not None

    async def delete(self, key: bytes, read: bytes | bytearray | None = None) -> bool:
        """Forgets a value, if Redis can be reached; its time to live does the rest. See `Store`.

        Another pruner may have put a good one in the place of the one that was `read`.
        """
        if read is None:
            return bool(await self._read("UNLINK", key))
        return bool(await self._asked("EVAL", _DELETE, 1, key, bytes(read[:_BEGINNING])))

    async def claim(self, key: bytes, token: bytes, seconds: float) -> bool | None:
        """See `Claims`."""
        return await self._asked("SET", key, token, "NX", "PX", int(1000 * seconds))

    async def renew(self, key: bytes, token: bytes, seconds: float) -> bool | None:
        """See `Claims`."""
        return await self._asked("EVAL", _RENEW, 1, key, token, int(1000 * seconds))

    async def release(self, key: bytes, token: bytes) -> None:
        """See `Claims`."""
        await self._asked("EVAL", _RELEASE, 1, key, token)

    async def is_claimed(self, key: bytes) -> bool | None:
        """See `Claims`. What never runs out is no claim of ours and would be waited for by all: it goes."""
        left_ms: int | None = await self._read("PTTL", key)
        if left_ms == _NEVER:
            await self.delete(key)
        return None if left_ms is None else left_ms >= 0

    async def close(self) -> None:
        """Ends what is running and closes the connections."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        with suppress(RedisError, OSError):  # a server that is away need not agree
            await close_client(self._redis)

    async def _store(self, key: bytes, value: bytes, owner: bytes) -> bool:
        """Sends a value, a large one in parts, and has it stored."""
        keys = [key, owner + b":uses", owner + b":sizes"]
        sizes = [self._ttl_s, len(value), self._share_bytes]
        if len(value) <= CHUNK_BYTES:
            await self._redis.execute_command("EVAL", _STORE, len(keys), *keys, *sizes, value)
            return True
        parts = b"%b:t:%b" % (owner, secrets.token_hex(16).encode())
        whole = memoryview(value)
        await self._redis.execute_command("SET", parts, whole[:CHUNK_BYTES], "EX", self.PARTS_TTL_S)
        for begin in range(CHUNK_BYTES, len(value), CHUNK_BYTES):
            await self._redis.execute_command("APPEND", parts, whole[begin : begin + CHUNK_BYTES])
        await self._redis.execute_command("EVAL", _STORE, len(keys) + 1, *keys, parts, *sizes)
        return True

    async def _part(self, key: bytes, begin: int) -> bytes | None:
        """A chunk of a value; None also for what is no value at all, which goes."""

        async def read() -> bytes:
            try:
                end = begin + CHUNK_BYTES - 1
                part: bytes = await self._redis.execute_command("GETRANGE", key, begin, end)
            except ResponseError as error:
                if not is_wrong_type(error):
                    raise
                log.warning("a cache key held no value, and was deleted")
                await self._redis.execute_command("UNLINK", key)
                return b""
            return part

        return await self._within(self._timeout_s, read, counts=True)

    async def _read(self, *command: Any) -> Any:
        """One command's answer within the short budget, or None."""
        return await self._within(self._timeout_s, lambda: self._redis.execute_command(*command), counts=True)

    async def _asked(self, *command: Any) -> bool | None:
        """Whether the answer is neither nil nor 0; None when there is none."""

        async def ask() -> bool:
            return bool(await self._redis.execute_command(*command))

        return await self._within(self._timeout_s, ask, counts=True)

    async def _within(
        self,
        budget_s: float,
        operation: Callable[[], Awaitable[Answer]],
        *,
        counts: bool,
        overdue_s: float | None = None,
    ) -> Answer | None:
        """The operation's answer within the budget, else None. An open breaker answers None at once."""
        if not self._breaker.admits():
            return None
        try:
            async with asyncio.timeout(budget_s) as limit:
                await self._turns.acquire()
        except TimeoutError:
            return None  # too many of us, which says nothing of Redis
        task = asyncio.ensure_future(operation())
        self._running.add(task)
        task.add_done_callback(self._ended)
        try:
            left_s = (limit.when() or 0) - asyncio.get_running_loop().time()
            done = await lateness.is_done(task, max(left_s, 0))
        finally:
            if not task.done():
                after_s = self.OVERDUE_S if overdue_s is None else overdue_s
                asyncio.get_running_loop().call_later(after_s, task.cancel)
        if task.cancelled():
            return None  # the store is closing
        error = task.exception() if done else TimeoutError()
        if error is None:
            if self._breaker.succeeded():
                log.warning("Redis answers again")
            return task.result()
        self._failed(error, counts=counts)
        return None

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """An operation is over, waited for or not."""
        self._running.discard(task)
        self._turns.release()
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report it as never seen

    def _failed(self, error: BaseException, *, counts: bool) -> None:
        """Takes note of a failure, of whatever kind: a cache fails no request."""
        telemetry.count("hiprune.cache.failures", operation="get" if counts else "put")
        if counts:
            if self._breaker.failed():
                log.warning("Redis fails (%s): every lookup is a miss until it answers", type(error).__name__)
        elif isinstance(error, ResponseError) and (now := time.monotonic()) >= self._warn_from:
            self._warn_from = now + self.WARN_EVERY_S
            log.warning("Redis refuses to store (%s): what is not there yet stays a miss", error)


class Breaker:
    """Leaves alone what failed a few times in a row; then lets one through at a time, until one succeeds."""

    def __init__(self, failures_to_open: int, open_s: float) -> None:
        self._failures_to_open = failures_to_open
        self._open_s = open_s
        self._failures = 0
        self._open_until = 0.0
        telemetry.measure("hiprune.cache.breaker", 0)

    def admits(self) -> bool:
        """Whether to try. When the time has come, one is the probe and the others wait for its answer."""
        now = time.monotonic()
        if now < self._open_until:
            return False
        if self._failures >= self._failures_to_open:
            self._open_until = now + self._open_s
        return True

    def succeeded(self) -> bool:
        """Closes it; whether it was open."""
        was_open = self._failures >= self._failures_to_open
        self._failures, self._open_until = 0, 0.0
        if was_open:
            telemetry.measure("hiprune.cache.breaker", 0)
        return was_open

    def failed(self) -> bool:
        """Counts a failure; whether it is the one that opened it."""
        self._failures += 1
        if self._failures >= self._failures_to_open:
            self._open_until = time.monotonic() + self._open_s
        if self._failures != self._failures_to_open:
            return False
        telemetry.measure("hiprune.cache.breaker", 1)
        return True
