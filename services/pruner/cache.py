"""The two-level cache of one tenant's images: encoded, and pruned.

- encoded: features and scores of an image; any policy or question re-prunes from it without the tower.
- pruned: the kept tokens for one policy, and for one question where the method reads it.

Tenants never share: every key and checksum is made with a key derived from the cache secret and the
tenant's name. Knows what identifies an answer; does not know how one is computed or where bytes live.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from google.protobuf.message import Message

from hiprune import cache_keys, telemetry, tensors
from hiprune.telemetry import stage
from hiprune.tensors import Memory
from hiprune.v1 import encoder_service_pb2, media_pb2, pruner_service_pb2, tensor_pb2
from services.pruner import records
from services.pruner.policy import Policy
from services.pruner.replicas import Replicas
from services.pruner.selection import SELECTION_VERSION
from services.pruner.stores import Store

log = logging.getLogger("hiprune.pruner.cache")

Level = Literal["encoded", "pruned"]
M = TypeVar("M", encoder_service_pb2.EncodeImageResponse, pruner_service_pb2.PrunedMedia)
Result = TypeVar("Result")

_MAX_PENDING: Final = 64
_THREAD_BYTES: Final = 1024 * 1024
"""Values above it are checked and parsed off the event loop: a megabyte takes a quarter of a millisecond."""
_TENANTS_REMEMBERED: Final = 1024
_CLOSE_S: Final = 5.0
"""For entries still on their way to the store when the process ends."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What an encoded image depends on besides its pixels."""

    vision_digest: str
    preprocessing_digest: str
    paired_digest: str
    """Of the paired text encoder, in whose space `aligned` is; empty without one."""
    fixed_tokens: int | None
    """Tokens of every image, where that is one number: see `Policy.canonical`."""


class TenantKeys:
    """Keys of one tenant, derived from the cache secret: HKDF for the tenant, HMAC for each entry."""

    def __init__(self, cache_secret: bytes, tenant: str, model: ModelIdentity) -> None:
        self.secret = cache_keys.tenant_secret(cache_secret, tenant)
        self.prefix = cache_keys.tenant_prefix(self.secret)
        self._model = model

    def encoded(self, media_digest: bytes) -> bytes:
        """Key of an encoded image."""
        return self._key(b"e", *self._image(media_digest))

    def pruned(self, media_digest: bytes, policy: Policy, question: str) -> bytes:
        """Key of a pruned image; the question counts only where the method reads it."""
        parts = [
            *self._image(media_digest),
            str(SELECTION_VERSION).encode(),
            policy.canonical(self._model.fixed_tokens),
        ]
        if policy.reads_text:
            parts.append(hashlib.sha256(question.encode()).digest())
        return self._key(b"p", *parts)

    def claim(self, media_digest: bytes, layers: Collection[int], aligned: bool) -> bytes:
        """Key by which one pruner tells the others that it is encoding so much of an image."""
        scope = repr((sorted(layers), aligned)).encode()
        return self._key(b"l", *self._image(media_digest), scope)

    def _image(self, media_digest: bytes) -> tuple[bytes, ...]:
        model = self._model
        identity = (model.vision_digest, model.preprocessing_digest, model.paired_digest)
        return (media_digest, *(part.encode() for part in identity))

    def _key(self, kind: bytes, *parts: bytes) -> bytes:
        return b":".join((self.prefix, kind, cache_keys.mac(self.secret, *parts)))


@dataclass(slots=True)
class _Put:
    """An entry on its way to the store: readable here as soon as it is packed."""

    packed: asyncio.Future[bytes | None]
    task: asyncio.Task[None]
    size: int


class TokenCache:
    """Encoded and pruned images over a store."""

    def __init__(
        self,
        store: Store,
        *,
        secret: bytes,
        model: ModelIdentity,
        max_value_bytes: int,
        max_pending_bytes: int | None = None,
    ) -> None:
        """`max_pending_bytes` bounds what is on its way to the store: by default two of the largest."""
        self.store = store
        self._secret = secret
        self._model = model
        self._max_value_bytes = max_value_bytes
        self._max_pending_bytes = 2 * max_value_bytes if max_pending_bytes is None else max_pending_bytes
        self._pending: dict[bytes, _Put] = {}
        self._pending_bytes = 0
        self._dtype: tensor_pb2.DataType.ValueType | None = None  # of what the encoder last answered
        # threads of our own: asyncio's default ones may all be waiting for a name server
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="cache")
        self.replicas = Replicas(store.claims)
        self._keys = functools.lru_cache(_TENANTS_REMEMBERED)(self._derive)

    @property
    def pending(self) -> int:
        """Entries on their way to the store."""
        return len(self._pending)

    def keys(self, tenant: str) -> TenantKeys:
        """The keys of a tenant."""
        return self._keys(tenant)

    async def get_encoded(
        self, keys: TenantKeys, media_digest: bytes, *, again: bool = False
    ) -> encoder_service_pb2.EncodeImageResponse | None:
        """The encoded image, or None. `again` for a caller who has just missed it: that counts once."""
        key = keys.encoded(media_digest)
        return await self._get(keys, key, encoder_service_pb2.EncodeImageResponse, "encoded", again)

    def put_encoded(
        self,
        keys: TenantKeys,
        media_digest: bytes,
        image: encoder_service_pb2.EncodeImageResponse,
        memory: Memory | None = None,
    ) -> asyncio.Future[None]:
        """Stores an encoded image, in the background: with every row of it, also of those in `memory`.

        What it returns is done when the entry can be found by others, or will not be.
        """
        self._dtype = _dtype_of(image)
        return self._put(keys, keys.encoded(media_digest), image, "encoded", memory)

    async def get_pruned(
        self, keys: TenantKeys, media_digest: bytes, policy: Policy, question: str
    ) -> pruner_service_pb2.PrunedMedia | None:
        """The pruned image, or None."""
        key = keys.pruned(media_digest, policy, question)
        return await self._get(keys, key, pruner_service_pb2.PrunedMedia, "pruned")

    def put_pruned(
        self,
        keys: TenantKeys,
        media_digest: bytes,
        policy: Policy,
        question: str,
        media: pruner_service_pb2.PrunedMedia,
    ) -> None:
        """Stores a pruned image, in the background."""
        self._put(keys, keys.pruned(media_digest, policy, question), media, "pruned")

    async def settled(self) -> None:
        """Returns when everything put so far can be found, or will not be."""
        if self._pending:
            await asyncio.wait([put.task for put in self._pending.values()])

    async def close(self) -> None:
        """Finishes what is being stored, if that does not take long, then closes the store."""
        tasks = [put.task for put in self._pending.values()]
        if tasks:
            _, unfinished = await asyncio.wait(tasks, timeout=_CLOSE_S)
            for task in unfinished:
                task.cancel()
        await self.replicas.close()
        await self.store.close()
        self._threads.shutdown(wait=False)

    async def _get(
        self, keys: TenantKeys, key: bytes, kind: type[M], level: Level, again: bool = False
    ) -> M | None:
        with stage("cache_get", {"hiprune.cache.level": level}) as span:
            message, outcome = await self._find(keys, key, kind)
            span.set_attribute("hiprune.cache.outcome", outcome)
            if self.store.name != "off" and not (again and message is None):
                telemetry.count("hiprune.cache.lookups", level=level, outcome=outcome)
            return message

    async def _find(self, keys: TenantKeys, key: bytes, kind: type[M]) -> tuple[M | None, str]:
        """An entry that may be used, and what became of the look-up."""
        put = self._pending.get(key)
        # what this process is just writing is read here, and not behind a store that may be slow
        value = await (self.store.get(key) if put is None else asyncio.shield(put.packed))
        if value is None:
            return None, "miss"
        unpack = functools.partial(records.unpack, value, kind, key=key, secret=keys.secret)
        try:
            message = unpack() if len(value) <= _THREAD_BYTES else await self._off_loop(unpack)
            if isinstance(message, encoder_service_pb2.EncodeImageResponse):
                _check_scores(message)
        except records.DamagedRecord as error:
            if not await self.store.delete(key, value):
                return None, "miss"  # replaced while it was read, which mixed the two; or gone by now
            log.warning("a damaged cache value was deleted: %s", error)
            return None, "damaged"
        if self._dtype is not None and _dtype_of(message) not in (None, self._dtype):
            return None, "other_dtype"  # of an encoder that ran in another type: replaced by what comes
        return message, "hit"

    def _put(
        self, keys: TenantKeys, key: bytes, message: Message, level: Level, memory: Memory | None = None
    ) -> asyncio.Future[None]:
        """Stores behind the answer. What does not fit, in size or in the queue, is not cached."""
        loop = asyncio.get_running_loop()
        nothing: asyncio.Future[None] = loop.create_future()
        nothing.set_result(None)
        if self.store.name == "off" or len(self._pending) >= _MAX_PENDING:
            return nothing
        # by its tensors, for now: protobuf's own count serialises the message, and this is the event loop
        size = sum(tensors.length_of(each) for each in tensors.tensors_in(message))
        if not self._fits(size) or self._pending_bytes + size > self._max_pending_bytes:
            return nothing
        before = self._pending.get(key)
        packed: asyncio.Future[bytes | None] = loop.create_future()
        pack = functools.partial(_pack, message, memory, key=key, secret=keys.secret)
        work = self._store(keys, key, pack, packed, level, after=before.task if before else None)
        put = _Put(packed, asyncio.create_task(work), size)
        self._pending[key] = put
        self._pending_bytes += size
        put.task.add_done_callback(lambda done: self._stored(key, put))
        return put.task

    def _stored(self, key: bytes, put: _Put) -> None:
        """Forgets a finished put, unless a later one for the same key has taken its place."""
        self._pending_bytes -= put.size
        if not put.packed.done():
            put.packed.set_result(None)
        if self._pending.get(key) is put:
            del self._pending[key]
        if not put.task.cancelled() and (error := put.task.exception()) is not None:
            log.error("an entry could not be stored", exc_info=error)

    async def _store(
        self,
        keys: TenantKeys,
        key: bytes,
        pack: Callable[[], bytes | None],
        packed: asyncio.Future[bytes | None],
        level: Level,
        *,
        after: asyncio.Task[None] | None,
    ) -> None:
        with stage("cache_put", {"hiprune.cache.level": level}):
            value = await self._off_loop(pack)
            del pack  # and with it the message, or the segment that it lies in
            if value is not None and not self._fits(len(value)):
                value = None
            packed.set_result(value)
            if after is not None:
                await asyncio.wait({after})  # two puts of one key end in their order: the last one stays
            if value is not None and await self.store.put(key, value, owner=keys.prefix):
                telemetry.count("hiprune.cache.stored", len(value), level=level)

    def _fits(self, size: int) -> bool:
        """Whether an entry of so many bytes is cached; says so where not."""
        if size > self._max_value_bytes:
            log.info("an entry of %d bytes is above cache_value_bytes and is not cached", size)
        return size <= self._max_value_bytes

    def _derive(self, tenant: str) -> TenantKeys:
        return TenantKeys(self._secret, tenant, self._model)

    async def _off_loop(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _pack(message: Message, memory: Memory | None, *, key: bytes, secret: bytes) -> bytes | None:
    """The value to store; None for a message with a NaN or an infinity in it, which nobody shall find."""
    # a segment is one call's: what is stored holds its own bytes
    whole = tensors.inlined(message, memory)
    if not records.is_finite(whole):
        log.warning("an entry with numbers that are not finite is not cached")
        return None
    return records.pack(whole, key=key, secret=secret)


def _check_scores(image: encoder_service_pb2.EncodeImageResponse) -> None:
    """Raises DamagedRecord for scores that no selection could use."""
    for view in image.views:
        for entry in view.attention:
            if not records.is_finite(entry):
                raise records.DamagedRecord(f"the scores of layer {entry.layer} are not finite")


def _dtype_of(
    message: encoder_service_pb2.EncodeImageResponse | pruner_service_pb2.PrunedMedia,
) -> tensor_pb2.DataType.ValueType | None:
    """Element type of an image's features; None where there are none."""
    for view in message.views:
        if view.HasField("features"):
            return view.features.dtype
    return None


def media_digest(media: media_pb2.Media) -> bytes:
    """SHA-256 (32 bytes) over a domain tag, the count, the length-prefixed parts and the frame rate."""
    if media.WhichOneof("content") == "video":
        rate = media.video.frames_per_second if media.video.HasField("frames_per_second") else 2.0
        return _digest(b"hiprune video 1", media.video.frames, repr(rate).encode())
    return _digest(b"hiprune image 1", [media.image], b"")


def _digest(tag: bytes, parts: Sequence[bytes], tail: bytes) -> bytes:
    digest = hashlib.sha256(tag + len(parts).to_bytes(8, "little"))
    for part in (*parts, tail):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
