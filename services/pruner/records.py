"""Cache values: a header that proves what the bytes are, and the bytes. Knows no store and no policy.

    magic and version   4 bytes   b"HPR2"
    nonce              12 bytes   random
    checksum           16 bytes   GMAC of the body, under a key of this tenant and cache key
    body                          a protobuf message: dtype, shape and raw bytes of each tensor

The checksum is keyed with the tenant's secret and bound to the cache key, so a value that was damaged,
truncated, moved under another key or written by somebody without the secret is no value at all. GMAC is
AES-GCM (NIST SP 800-38D) with nothing to encrypt: at memory's speed, where a hash costs more than the read.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final, TypeVar

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.protobuf.message import DecodeError, Message

from hiprune import tensors
from hiprune.v1 import tensor_pb2

MAGIC: Final = b"HPR2"
_NONCE_BYTES: Final = 12
_CHECKSUM_BYTES: Final = 16
_HEADER_BYTES: Final = len(MAGIC) + _NONCE_BYTES + _CHECKSUM_BYTES
_EXPONENTS: Final[dict[int, tuple[str, int]]] = {
    tensor_pb2.DATA_TYPE_BF16: ("<u2", 0x7F80),
    tensor_pb2.DATA_TYPE_F16: ("<u2", 0x7C00),
    tensor_pb2.DATA_TYPE_F32: ("<u4", 0x7F800000),
}
"""Bits of the exponent, all of them set in NaN and infinities alone (IEEE 754)."""
_BLOCK: Final = 2**18

M = TypeVar("M", bound=Message)


class DamagedRecord(Exception):
    """The bytes are not a record under this key. The caller treats it as a miss and deletes it."""


def pack(message: Message, *, key: bytes, secret: bytes) -> bytes:
    """The value to store under `key`. `secret` is the tenant's, at most 64 bytes."""
    body = message.SerializeToString()
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return b"".join((MAGIC, nonce, _gmac(key, secret).encrypt(nonce, b"", body), body))


def unpack(value: bytes | bytearray, kind: type[M], *, key: bytes, secret: bytes) -> M:
    """The message that was stored under `key`. Raises DamagedRecord."""
    if value[: len(MAGIC)] != MAGIC:
        raise DamagedRecord(f"begins with {bytes(value[: len(MAGIC)])!r}, expected {MAGIC!r}")
    if len(value) < _HEADER_BYTES:
        raise DamagedRecord(f"{len(value)} bytes, expected at least {_HEADER_BYTES}")
    nonce = value[len(MAGIC) : len(MAGIC) + _NONCE_BYTES]
    body = memoryview(value)[_HEADER_BYTES:]
    try:
        _gmac(key, secret).decrypt(nonce, value[_HEADER_BYTES - _CHECKSUM_BYTES : _HEADER_BYTES], body)
    except InvalidTag as error:
        raise DamagedRecord("checksum does not match") from error
    message = kind()
    try:
        message.ParseFromString(body)  # type: ignore[arg-type]  # any buffer, says its documentation
    except DecodeError as error:  # checked bytes of another version
        raise DamagedRecord("not a message of this kind") from error
    return message


def is_finite(message: Message) -> bool:
    """Whether no tensor of a message, all of whose elements are within it, holds a NaN or an infinity."""
    return all(_is_finite(each) for each in tensors.tensors_in(message))


def _is_finite(tensor: tensor_pb2.Tensor) -> bool:
    if tensor.dtype not in _EXPONENTS:
        return True
    kind, exponent = _EXPONENTS[tensor.dtype]
    numbers = np.frombuffer(tensor.data, kind)  # (n,)
    # in blocks, which stay in the processor's cache
    return not any(
        bool(((numbers[begin : begin + _BLOCK] & exponent) == exponent).any())
        for begin in range(0, len(numbers), _BLOCK)
    )


def _gmac(key: bytes, secret: bytes) -> AESGCM:
    """The checksum's cipher: a key of its own for each cache key, so that a nonce is used once in it."""
    return AESGCM(hashlib.blake2b(key, digest_size=32, key=secret).digest())
