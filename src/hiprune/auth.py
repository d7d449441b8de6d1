"""Who is calling, and for whom: the decision, and the caller of the request being served.

Pure: knows what a request brought along and a service's rules; knows no file, no gRPC and no limit's count.

    authorization: Bearer KEY     a client, at the first service it reaches. The key ends there.
    x-hiprune-tenant: NAME        a service, on behalf of that client. Taken from trusted peers only.
    x-hiprune-peer: TOKEN         how a service shows that it is one, where TLS does not do that.

A peer is trusted for its token, for a certificate that TLS has verified, or for having been able to open
this service's Unix socket: then the file's permissions decide, and nothing else does.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, Protocol

from hiprune.errors import PermissionDenied, Unauthenticated
from hiprune.v1 import pruner_service_pb2

ANONYMOUS_TENANT: Final = "anonymous"
"""The tenant of callers without a key, where those are served."""

KEY_HEADER: Final = "authorization"
TENANT_HEADER: Final = "x-hiprune-tenant"
PEER_HEADER: Final = "x-hiprune-peer"

TENANT_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
"""What a tenant may be called: lower case, at most 64 characters, fit for metrics, keys and headers."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may do; None: no limit. Each is the field of that name in the tenants file."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Visual tokens kept by pruning."""
    concurrency: int | None = None
    max_image_bytes: int | None = None
    max_image_pixels: int | None = None

    @property
    def bounds_images(self) -> bool:
        """Whether images must be looked at."""
        return self.max_image_bytes is not None or self.max_image_pixels is not None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody who uses the service, on an account of their own."""

    name: str
    limits: Limits = Limits()
    policy: pruner_service_pb2.PrunePolicy = field(default_factory=pruner_service_pb2.PrunePolicy)
    """What stands for the fields that a request leaves unset."""

    def complete(self, policy: pruner_service_pb2.PrunePolicy) -> pruner_service_pb2.PrunePolicy:
        """A request's policy, what it leaves unset filled in from the tenant's default. A copy."""
        whole = pruner_service_pb2.PrunePolicy()
        whole.CopyFrom(self.policy)
        # what is unset, and an enum at zero, which means the same, leaves the default as it is; a budget of
        # either kind takes the default's place
        whole.MergeFrom(policy)
        return whole


ANONYMOUS: Final = Tenant(ANONYMOUS_TENANT)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request is being served."""

    tenant: Tenant
    first: bool = True
    """This is the first service that the request reached: its default policy and limits apply here."""


_caller: ContextVar[Caller] = ContextVar("hiprune_caller", default=Caller(ANONYMOUS))  # noqa: B039  # frozen


def current() -> Caller:
    """The caller of the current request; an anonymous one outside of any."""
    return _caller.get()


def enter(caller: Caller) -> None:
    """Sets the caller of the current request."""
    _caller.set(caller)


# --- the decision ------------------------------------------------------------------------------------------


class Accounts(Protocol):
    """The tenants that a service knows."""

    def of_key(self, key: str) -> Tenant | None:
        """The tenant whose key this is. Takes as long for a wrong secret as for the right one."""

    def named(self, name: str) -> Tenant | None:
        """The tenant of that name."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a request brought along."""

    metadata: Iterable[tuple[str, str | bytes]]
    unix: bool = False
    """It came through a Unix socket."""
    certified: bool = False
    """Its peer showed a certificate, and TLS has verified it."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Whom a service lets in."""

    accounts: Accounts | None = None
    """None: no tenants are configured."""
    peer_token: str = ""
    allow_anonymous: bool = False
    peers_only: bool = False
    """Without a key, only trusted peers are served."""


def admit(arrival: Arrival, rules: Rules) -> Caller:
    """The caller behind a request. Raises Unauthenticated, PermissionDenied; neither repeats a secret."""
    token = _single(arrival.metadata, PEER_HEADER)
    named = _single(arrival.metadata, TENANT_HEADER)
    credentials = _single(arrival.metadata, KEY_HEADER)
    if token and rules.peer_token and not _equal(token, rules.peer_token):
        raise PermissionDenied(
            f"{PEER_HEADER} is not this service's peer_token: set the same one on both",
            reason="UNTRUSTED_PEER",
        )
    trusted = bool(token and rules.peer_token) or arrival.certified or arrival.unix
    if named is not None:
        if not trusted:
            raise PermissionDenied(
                f"{TENANT_HEADER} is taken from this service's own peers only, by peer_token, by a client "
                "certificate or on a Unix socket; clients send `authorization: Bearer KEY`",
                reason="UNTRUSTED_PEER",
            )
        if not TENANT_NAME.fullmatch(named):
            raise PermissionDenied(f"{TENANT_HEADER} is no tenant's name", reason="UNTRUSTED_PEER")
        return Caller(Tenant(named), first=False)
    if rules.accounts is not None:
        if credentials is not None:
            return Caller(_tenant_of(credentials, rules.accounts))
        if not rules.allow_anonymous:
            raise Unauthenticated("no API key: send the metadata `authorization: Bearer KEY`")
        return Caller(rules.accounts.named(ANONYMOUS_TENANT) or ANONYMOUS)
    if rules.peers_only and not trusted:
        raise Unauthenticated("only this service's own peers are served here", reason="UNTRUSTED_PEER")
    return Caller(ANONYMOUS)


def _tenant_of(credentials: str, accounts: Accounts) -> Tenant:
    scheme, _, key = credentials.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("the metadata `authorization` is not of the form `Bearer KEY`")
    tenant = accounts.of_key(key.strip())
    if tenant is None:
        raise Unauthenticated("the API key is not known here: it is mistyped, or has been removed")
    return tenant


def _single(metadata: Iterable[tuple[str, str | bytes]], name: str) -> str | None:
    """The value of a header, or None. Raises Unauthenticated for one that comes twice: which would count?"""
    values = [value for key, value in metadata if key == name]
    if len(values) > 1:
        raise Unauthenticated(f"the metadata `{name}` comes {len(values)} times, expected once")
    if not values:
        return None
    value = values[0]
    return value if isinstance(value, str) else value.decode("latin-1")


def _equal(one: str, other: str) -> bool:
    """Whether two secrets are the same, in a time that tells nothing of either, not even its length."""
    digests = (hashlib.sha256(each.encode("utf-8", "surrogatepass")).digest() for each in (one, other))
    return hmac.compare_digest(*digests)


# --- addresses ---------------------------------------------------------------------------------------------


def can_be_sent(key: str) -> bool:
    """Whether a key is of characters that a header may hold."""
    return key.isascii() and key.isprintable()


def is_unix(address: str) -> bool:
    """Whether an address, to listen on or of a peer, is a Unix socket's."""
    return address.startswith(("unix:", "unix-abstract:"))


def is_private(listen: str) -> bool:
    """Whether an address can only be reached from this machine: a Unix socket or a loopback address."""
    if is_unix(listen):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
