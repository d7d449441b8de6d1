"""The names under which a tenant's cached images lie in a store, and the secret that they are made with.

Everything of one tenant begins with one prefix that only holders of the cache secret can compute, and that
tells nothing of the tenant's name. Pure; knows no store and no image.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

NAMESPACE: Final = b"hiprune:v1"
LEVELS: Final = {b"e": "encoded", b"p": "pruned"}
"""Kinds of entries, by the letter behind the prefix."""


def tenant_secret(cache_secret: bytes, tenant: str) -> bytes:
    """A tenant's own 32 bytes: HKDF-SHA256 (RFC 5869) of the secret that the pruners share."""
    return HKDF(SHA256(), 32, salt=None, info=b"hiprune tenant " + tenant.encode()).derive(cache_secret)


def tenant_prefix(secret: bytes) -> bytes:
    """What every key of a tenant begins with, given its `tenant_secret`; a colon follows.

    The braces are a hash tag (Redis cluster specification): all that one tenant holds is on one node, so
    that a script may see it together.
    """
    return b"%b:{%b}" % (NAMESPACE, mac(secret, b"tenant")[:32])


def mac(secret: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 of length-prefixed parts, in hexadecimal (64 bytes)."""
    return hmac.new(secret, length_prefixed(parts), hashlib.sha256).hexdigest().encode()


def length_prefixed(parts: Sequence[bytes]) -> bytes:
    """The parts, each behind its length, so that no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
