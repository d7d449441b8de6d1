"""The two-level cache of one tenant's images: encoded, and pruned.

- encoded: features and scores of an image; any policy or question re-prunes from it without the tower.
- pruned: the kept tokens for one policy, and for one question where the method reads it.

Tenants never share: every key and checksum is made with a key derived from the cache secret and the
tenant's name. Knows what identifies an answer; does not know how one is computed or where bytes live.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from google.protobuf.message import Message

from hiprune import tensors
from hiprune.telemetry import stage
from hiprune.tensors import Memory
from hiprune.v1 import encoder_service_pb2, media_pb2, pruner_service_pb2
from services.pruner import records
from services.pruner.policy import Policy
from services.pruner.selection import SELECTION_VERSION
from services.pruner.stores import Store

log = logging.getLogger("hiprune.pruner.cache")

NAMESPACE: Final = b"hiprune:v1"
_MAX_PENDING: Final = 64
_THREAD_BYTES: Final = 256 * 1024
"""Values above it are hashed and parsed off the event loop: a megabyte takes a millisecond."""

M = TypeVar("M", bound=Message)


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
        self.secret = HKDF(SHA256(), 32, salt=None, info=b"hiprune tenant " + tenant.encode()).derive(
            cache_secret
        )
        self.prefix = b":".join((NAMESPACE, self._mac(b"tenant")[:32]))
        self._model = model

    def encoded(self, media_digest: bytes) -> bytes:
        """Key of an encoded image."""
        return b":".join((self.prefix, b"e", self._mac(*self._image(media_digest))))

    def pruned(self, media_digest: bytes, policy: Policy, question: str) -> bytes:
        """Key of a pruned image; the question counts only where the method reads it."""
        parts = [
            *self._image(media_digest),
            str(SELECTION_VERSION).encode(),
            policy.canonical(self._model.fixed_tokens),
        ]
        if policy.reads_text:
            parts.append(hashlib.sha256(question.encode()).digest())
        return b":".join((self.prefix, b"p", self._mac(*parts)))

    def _image(self, media_digest: bytes) -> tuple[bytes, ...]:
        model = self._model
        identity = (model.vision_digest, model.preprocessing_digest, model.paired_digest)
        return (media_digest, *(part.encode() for part in identity))

    def _mac(self, *parts: bytes) -> bytes:
        """HMAC-SHA256 (hex) of length-prefixed parts."""
        return hmac.new(self.secret, length_prefixed(parts), hashlib.sha256).hexdigest().encode()


class TokenCache:
    """Encoded and pruned images over a store."""

    def __init__(self, store: Store, *, secret: bytes, model: ModelIdentity, max_value_bytes: int) -> None:
        self.store = store
        self._secret = secret
        self._model = model
        self._max_value_bytes = max_value_bytes
        self._pending: dict[bytes, asyncio.Task[None]] = {}

    def keys(self, tenant: str) -> TenantKeys:
        """The keys of a tenant."""
        return TenantKeys(self._secret, tenant, self._model)

    async def get_encoded(
        self, keys: TenantKeys, media_digest: bytes
    ) -> encoder_service_pb2.EncodeImageResponse | None:
        """The encoded image, or None."""
        return await self._get(keys, keys.encoded(media_digest), encoder_service_pb2.EncodeImageResponse)

    def put_encoded(
        self,
        keys: TenantKeys,
        media_digest: bytes,
        image: encoder_service_pb2.EncodeImageResponse,
        memory: Memory | None = None,
    ) -> None:
        """Stores an encoded image, in the background: with every row of it, also of those in `memory`."""
        self._put(keys, keys.encoded(media_digest), image, memory)

    async def get_pruned(
        self, keys: TenantKeys, media_digest: bytes, policy: Policy, question: str
    ) -> pruner_service_pb2.PrunedMedia | None:
        """The pruned image, or None."""
        return await self._get(
            keys, keys.pruned(media_digest, policy, question), pruner_service_pb2.PrunedMedia
        )

    def put_pruned(
        self,
        keys: TenantKeys,
        media_digest: bytes,
        policy: Policy,
        question: str,
        media: pruner_service_pb2.PrunedMedia,
    ) -> None:
        """Stores a pruned image, in the background."""
        self._put(keys, keys.pruned(media_digest, policy, question), media)

    async def close(self) -> None:
        """Finishes what is being stored, then closes the store."""
        await asyncio.gather(*self._pending.values())
        await self.store.close()

    async def _get(self, keys: TenantKeys, key: bytes, kind: type[M]) -> M | None:
        with stage("cache_get"):
            if (pending := self._pending.get(key)) is not None:
                await asyncio.shield(pending)  # read what this process is just writing
            value = await self.store.get(key)
            if value is None:
                return None
            try:
                if len(value) > _THREAD_BYTES:
                    return await asyncio.to_thread(records.unpack, value, kind, key=key, secret=keys.secret)
                return records.unpack(value, kind, key=key, secret=keys.secret)
            except records.DamagedRecord as error:
                log.warning("a damaged cache value was deleted: %s", error)
                await self.store.delete(key)
                return None

    def _put(self, keys: TenantKeys, key: bytes, message: Message, memory: Memory | None = None) -> None:
        """Stores behind the answer. What does not fit, in size or in the queue, is not cached."""
        if self.store.name == "off" or len(self._pending) >= _MAX_PENDING:
            return
        # by its tensors, for now: protobuf's own count serialises the message, and this is the event loop
        if not self._fits(sum(tensors.length_of(each) for each in tensors.tensors_in(message))):
            return
        after = self._pending.get(key)
        task = asyncio.create_task(self._store(keys, key, message, memory, after=after))
        self._pending[key] = task
        task.add_done_callback(lambda done: self._stored(key, done))

    def _stored(self, key: bytes, done: asyncio.Task[None]) -> None:
        """Forgets a finished put, unless a later one for the same key has taken its place."""
        if self._pending.get(key) is done:
            del self._pending[key]

    async def _store(
        self,
        keys: TenantKeys,
        key: bytes,
        message: Message,
        memory: Memory | None,
        *,
        after: asyncio.Task[None] | None,
    ) -> None:
        if after is not None:
            await asyncio.wait({after})  # two puts of one key end in their order: the last one stays

        def pack() -> bytes:
            # a segment is one call's: what is stored holds its own bytes
            return records.pack(tensors.inlined(message, memory), key=key, secret=keys.secret)

        value = await asyncio.to_thread(pack)
        if self._fits(len(value)):
            await self.store.put(key, value)

    def _fits(self, size: int) -> bool:
        """Whether an entry of so many bytes is cached; says so where not."""
        if size > self._max_value_bytes:
            log.info("an entry of %d bytes is above cache_value_bytes and is not cached", size)
        return size <= self._max_value_bytes


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


def length_prefixed(parts: Sequence[bytes]) -> bytes:
    """The parts, each behind its length, so that no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
