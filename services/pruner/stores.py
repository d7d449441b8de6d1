"""Where cache values live: what every store does, and the two that need no other process.

A store never fails a request: trouble is a miss. Values have owners, none of whom holds more than a share.
Knows keys and bytes; knows no tenant and no image. Redis is in `services.pruner.redis_store`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Claims(Protocol):
    """Claims on keys that processes make to each other. None: cannot be said, so act as if alone."""

    async def claim(self, key: bytes, token: bytes, seconds: float) -> bool | None:
        """Claims a key that nobody claims, for so long; whether it is the caller's now."""

    async def renew(self, key: bytes, token: bytes, seconds: float) -> bool | None:
        """Keeps a claim for so long from now; False where it was lost."""

    async def release(self, key: bytes, token: bytes) -> None:
        """Gives a claim up, unless it was lost."""

    async def is_claimed(self, key: bytes) -> bool | None:
        """Whether anybody claims the key."""


class Store(Protocol):
    """Keys to values with a time to live. No method raises; an unreachable store knows nothing."""

    @property
    def name(self) -> str:
        """What `cache` names it."""

    @property
    def claims(self) -> Claims | None:
        """Where several processes share the store, their claims on it."""

    async def get(self, key: bytes) -> bytes | bytearray | None:
        """The value, or None."""

    async def put(self, key: bytes, value: bytes, *, owner: bytes) -> bool:
        """Stores a value, at the cost of the owner's least recently used ones; whether it did."""

    async def delete(self, key: bytes, read: bytes | bytearray | None = None) -> bool:
        """Forgets a value; with `read`, only where that is what still stands there. Whether it did."""

    async def close(self) -> None:
        """Frees connections."""


class NoStore:
    """No cache: every lookup is a miss."""

    name = "off"
    claims = None

    async def get(self, key: bytes) -> bytes | None:
        """None."""
        return None

    async def put(self, key: bytes, value: bytes, *, owner: bytes) -> bool:
        """Nothing."""
        return False

    async def delete(self, key: bytes, read: bytes | bytearray | None = None) -> bool:
        """Nothing."""
        return False

    async def close(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class _Entry:
    value: bytes
    owner: bytes
    expires: float


class MemoryStore:
    """An in-process store bounded in bytes, in all and by owner: the least recently used goes first."""

    name = "memory"
    claims = None

    def __init__(
        self,
        max_bytes: int,
        ttl_s: float,
        *,
        share_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._share_bytes = max_bytes if share_bytes is None else min(share_bytes, max_bytes)
        self._ttl_s = ttl_s
        self._clock = clock
        # one time to live for all, so that in the order in which they were put, they also expire
        self._entries: dict[bytes, _Entry] = {}
        self._used: OrderedDict[bytes, None] = OrderedDict()  # the least recently used first
        self._owned: dict[bytes, OrderedDict[bytes, None]] = {}  # the same, by owner
        self._held: dict[bytes, int] = {}  # bytes by owner
        self._total = 0

    async def get(self, key: bytes) -> bytes | None:
        """The value, or None."""
        entry = self._entries.get(key)
        if entry is None or entry.expires <= self._clock():
            return None
        self._used.move_to_end(key)
        self._owned[entry.owner].move_to_end(key)
        return entry.value

    async def put(self, key: bytes, value: bytes, *, owner: bytes) -> bool:
        """Stores a value, unless it is larger than a whole share."""
        if len(value) > self._share_bytes:
            return False
        self._drop(key)
        self._drop_expired()
        while self.held(owner) + len(value) > self._share_bytes:
            self._drop(next(iter(self._owned[owner])))
        while self._total + len(value) > self._max_bytes:
            self._drop(next(iter(self._used)))
        self._entries[key] = _Entry(value, owner, self._clock() + self._ttl_s)
        self._used[key] = None
        self._owned.setdefault(owner, OrderedDict())[key] = None
        self._held[owner] = self.held(owner) + len(value)
        self._total += len(value)
        return True

    async def delete(self, key: bytes, read: bytes | bytearray | None = None) -> bool:
        """Forgets a value; with `read`, only where that is what still stands there. Whether it did."""
        entry = self._entries.get(key)
        if entry is None or (read is not None and entry.value != read):
            return False
        self._drop(key)
        return True

    async def close(self) -> None:
        """Forgets everything."""
        for each in (self._entries, self._used, self._owned, self._held):
            each.clear()
        self._total = 0

    def held(self, owner: bytes) -> int:
        """Bytes of an owner's values."""
        return self._held.get(owner, 0)

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.expires > now:
                return
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        del self._used[key]
        del self._owned[entry.owner][key]
        self._held[entry.owner] -= len(entry.value)
        self._total -= len(entry.value)
        if not self._owned[entry.owner]:
            del self._owned[entry.owner], self._held[entry.owner]
