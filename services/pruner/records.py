"""Cache values: a header that proves what the bytes are, and the bytes. Knows no store and no policy.

    magic and version   4 bytes   b"HPR1"
    checksum           16 bytes   keyed BLAKE2b over the entry's own cache key and the body
    body                          a protobuf message: dtype, shape and raw bytes of each tensor

The checksum is keyed with the tenant's key and covers the cache key, so a value that was damaged,
truncated, moved under another key or written by somebody without the secret is no value at all.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

MAGIC: Final = b"HPR1"
_CHECKSUM_BYTES: Final = 16
_HEADER_BYTES: Final = len(MAGIC) + _CHECKSUM_BYTES

M = TypeVar("M", bound=Message)


class DamagedRecord(Exception):
    """The bytes are not a record under this key. The caller treats it as a miss and deletes it."""


def pack(message: Message, *, key: bytes, secret: bytes) -> bytes:
    """The value to store under `key`. `secret` is the tenant's, at most 64 bytes."""
    body = message.SerializeToString()
    return b"".join((MAGIC, _checksum(body, key, secret), body))


def unpack(value: bytes, kind: type[M], *, key: bytes, secret: bytes) -> M:
    """The message that was stored under `key`. Raises DamagedRecord."""
    if value[: len(MAGIC)] != MAGIC:
        raise DamagedRecord(f"begins with {value[: len(MAGIC)]!r}, expected {MAGIC!r}")
    body = memoryview(value)[_HEADER_BYTES:]
    if not hmac.compare_digest(value[len(MAGIC) : _HEADER_BYTES], _checksum(body, key, secret)):
        raise DamagedRecord("checksum does not match")
    message = kind()
    try:
        message.ParseFromString(bytes(body))
    except DecodeError as error:  # checked bytes of another version
        raise DamagedRecord("not a message of this kind") from error
    return message


def _checksum(body: bytes | memoryview, key: bytes, secret: bytes) -> bytes:
    digest = hashlib.blake2b(len(key).to_bytes(8, "little") + key, digest_size=_CHECKSUM_BYTES, key=secret)
    digest.update(body)
    return digest.digest()
