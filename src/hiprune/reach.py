"""Whether the services and Redis can be reached and fit each other: findings of `hiprune doctor`.

Asks and changes nothing. No secret is in any finding: a Redis is named by its use and not by its URL.
"""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hiprune import auth
from hiprune.calls import connect
from hiprune.checks import OK, PROBLEM, SERVICES, WARNING, Finding
from hiprune.errors import HipruneError, from_rpc
from hiprune.v1 import (
    encoder_service_pb2,
    encoder_service_pb2_grpc,
    llm_service_pb2,
    llm_service_pb2_grpc,
    pruner_service_pb2,
    pruner_service_pb2_grpc,
)

_TIMEOUT_S: Final = 5.0
_CLOCK_S: Final = 2.0
"""How far two clocks may be apart before traces and times to retry confuse people."""
_LEAST_REDIS: Final = (6, 0)


# --- services ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """A service to be asked."""

    service: str
    address: str
    expected: bool
    """Somebody has said that it is there; otherwise it is looked for where it usually is."""


async def check_services(
    places: Sequence[Place], credentials: grpc.ChannelCredentials | None, key: str
) -> list[Finding]:
    """Each gRPC service: reachable, ready, and all of them with the same tower."""
    metadata = ((auth.KEY_HEADER, f"Bearer {key}"),) if key else ()
    asked = await asyncio.gather(*(_ask_service(place, credentials, metadata) for place in places))
    findings = [finding for finding, _ in asked]
    prints = {place.service: found for place, (_, found) in zip(places, asked, strict=True) if found}
    if len(prints) > 1:
        findings.append(_agreement(prints))
    return findings


async def _ask_service(
    place: Place, credentials: grpc.ChannelCredentials | None, metadata: tuple[tuple[str, str], ...]
) -> tuple[Finding, encoder_service_pb2.ModelFingerprint | None]:
    secured = None if auth.is_unix(place.address) else credentials
    async with connect(place.address, credentials=secured) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=""), timeout=_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            return _unreachable(place, error), None
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
            advice = "it may still be loading: its log says what it waits for"
            return Finding(place.service, PROBLEM, f"{place.address} says {state}", advice), None
        try:
            said, fingerprint = await _DESCRIBED[place.service](channel, metadata)
        except grpc.aio.AioRpcError as error:
            known = from_rpc(error, peer=place.service)
            return Finding(place.service, PROBLEM, f"{place.address}: {known}", _advice_for(known)), None
    return Finding(place.service, OK, f"{place.address} is ready: {said}"), fingerprint


_Described = tuple[str, encoder_service_pb2.ModelFingerprint]


async def _describe_llm(channel: grpc.aio.Channel, metadata: Any) -> _Described:
    stub = llm_service_pb2_grpc.LanguageModelServiceStub(channel)
    request = llm_service_pb2.GetLanguageModelRequest()
    found = await stub.GetLanguageModel(request, timeout=_TIMEOUT_S, metadata=metadata)
    return f"{found.model}, engine {found.engine}, context {found.context_length}", found.fingerprint


async def _describe_pruner(channel: grpc.aio.Channel, metadata: Any) -> _Described:
    stub = pruner_service_pb2_grpc.PrunerServiceStub(channel)
    request = pruner_service_pb2.GetPrunerRequest()
    found = await stub.GetPruner(request, timeout=_TIMEOUT_S, metadata=metadata)
    text = found.text_model or "no text model"
    return f"{found.fingerprint.family}, {text}, cache {found.cache_store}", found.fingerprint


async def _describe_encoder(channel: grpc.aio.Channel, metadata: Any) -> _Described:
    stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
    request = encoder_service_pb2.GetEncoderRequest()
    found = await stub.GetEncoder(request, timeout=_TIMEOUT_S, metadata=metadata)
    return f"{found.fingerprint.family}, {found.fingerprint.layers} layers", found.fingerprint


_DESCRIBED: Final[Mapping[str, Callable[[grpc.aio.Channel, Any], Awaitable[_Described]]]] = {
    "llm": _describe_llm,
    "pruner": _describe_pruner,
    "encoder": _describe_encoder,
}


def _agreement(prints: Mapping[str, encoder_service_pb2.ModelFingerprint]) -> Finding:
    """Whether all hold the same tower, prepare pixels alike, and compare with the same text encoder."""
    for name in ("vision_digest", "preprocessing_digest", "paired_digest"):
        found = {service: getattr(each, name) for service, each in prints.items() if getattr(each, name)}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{service} {digest[:12]}…" for service, digest in found.items())
            return Finding(
                "fingerprints", PROBLEM, f"{name} differs: {said}", "give all of them the same --model"
            )
    digest = next(iter(prints.values())).vision_digest
    return Finding("fingerprints", OK, f"{', '.join(prints)} hold the same tower, {digest[:12]}…")


def _unreachable(place: Place, error: grpc.aio.AioRpcError) -> Finding:
    said = f"{place.address}: nobody answers ({error.code().name})"
    if not place.expected:
        return Finding(
            place.service, WARNING, said, f"`hiprune up` starts it; --{place.service} says where it is"
        )
    advice = "is it running, is the port right, is TLS on at one end alone (HIPRUNE_TLS_CA)?"
    return Finding(place.service, PROBLEM, said, advice)


def _advice_for(error: HipruneError) -> str:
    if error.code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return "set HIPRUNE_KEY: `hiprune tenant key NAME` makes one"
    return "its log has the cause"


def check_gateway(place: Place, authority: str = "") -> Iterator[Finding]:
    """The HTTP gateway at HOST:PORT or https://HOST:PORT, and its clock against ours.

    `authority` is the file of whose certificates it has; empty: those that the system takes.
    """
    scheme, _, host = place.address.rpartition("://")
    url = f"{scheme or 'http'}://{host}"
    connection: http.client.HTTPConnection
    try:
        if scheme == "https":
            context = ssl.create_default_context(cafile=authority or None)
            connection = http.client.HTTPSConnection(host, timeout=_TIMEOUT_S, context=context)
        else:
            connection = http.client.HTTPConnection(host, timeout=_TIMEOUT_S)
    except (OSError, http.client.InvalidURL) as error:
        yield Finding("gateway", PROBLEM, f"{url}: {error}", "expected HOST:PORT or https://HOST:PORT")
        return
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        date = answer.headers.get("date")
    except (OSError, http.client.HTTPException) as error:
        if place.expected:
            said = f"{url}: {str(error) or type(error).__name__}"
            yield Finding("gateway", PROBLEM, said, "is it running, and is it http or https there?")
        else:
            yield Finding("gateway", OK, f"none at {url}, and gRPC needs none")
        return
    finally:
        connection.close()
    if answer.status != http.client.OK:
        status = PROBLEM if place.expected else WARNING  # it may be somebody else's server
        said = f"{url} says {answer.status}"
        yield Finding("gateway", status, said, "is it hiprune's, and does it reach the llm?")
    else:
        yield Finding("gateway", OK, f"{url} is ready")
    if date:
        yield from _clock("the gateway's", parsedate_to_datetime(date).timestamp() + 0.5)


# --- Redis -------------------------------------------------------------------------------------------------


async def check_redis(environ: Mapping[str, str]) -> list[Finding]:
    """Each Redis that the services are told to use; none where none is."""
    uses: dict[str, list[str]] = {}
    if environ.get("HIPRUNE_PRUNER_CACHE") == "redis":
        uses.setdefault(environ.get("HIPRUNE_PRUNER_REDIS_URL", "redis://127.0.0.1:6379/0"), []).append(
            "cache"
        )
    for service in SERVICES:
        if url := environ.get(f"HIPRUNE_{service.upper()}_LIMITS_REDIS_URL"):
            uses.setdefault(url, []).append(f"limits of the {service}")
    if not uses:
        return [Finding("redis", OK, "none is set: each process has a cache and limits of its own")]
    if importlib.util.find_spec("redis") is None:
        return [Finding("redis", PROBLEM, "is set, and its client is not installed", "pip install redis")]
    found: list[Finding] = []
    for url, what in uses.items():
        found += await _ask_redis(url, ", ".join(what), caches="cache" in what)
    return found


async def _ask_redis(url: str, use: str, *, caches: bool) -> list[Finding]:
    """One Redis, named by its use: its URL may hold a password."""
    from redis.exceptions import RedisClusterException, RedisError

    from hiprune.redis_clients import EXPECTED, close_client, open_client

    check = f"redis ({use})"
    try:
        client = open_client(url, connect_timeout_s=_TIMEOUT_S, max_connections=2)
    except (ValueError, TypeError):
        return [Finding(check, PROBLEM, "its URL is none", f"expected {EXPECTED}")]
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            whole: Any = await client.info()
            info = whole if "redis_version" in whole else next(iter(whole.values()))  # a cluster's, by node
            now = await client.time()
    except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
        said = str(error) or type(error).__name__
        return [Finding(check, PROBLEM, said, "is it running, is the URL right, does it want a password?")]
    finally:
        await close_client(client)
    moment: Any = now if isinstance(now, tuple) else next(iter(now.values()))
    return [
        *_redis_findings(check, info, caches=caches),
        *_clock("Redis's", moment[0] + moment[1] / 1e6),
    ]


def _redis_findings(check: str, info: Mapping[str, Any], *, caches: bool) -> Iterator[Finding]:
    """Of what INFO says."""
    version = str(info["redis_version"])
    limit, policy = int(info.get("maxmemory", 0)), str(info.get("maxmemory_policy", "unknown"))
    used = int(info.get("used_memory", 0))
    said = f"Redis {version}, {used / 2**20:.0f} MiB used"
    if tuple(int(part) for part in version.split(".")[:2]) < _LEAST_REDIS:
        yield Finding(check, PROBLEM, said, "6.0 or newer is needed")
    elif not caches:
        yield Finding(check, OK, said)
    elif not limit:
        advice = (
            "CONFIG SET maxmemory 512mb, as much as is to spare: without, it grows until the machine is full"
        )
        yield Finding(check, WARNING, f"{said}, no maxmemory", advice)
    elif policy == "noeviction":
        advice = (
            "CONFIG SET maxmemory-policy allkeys-lru: a full one refuses to store, and all becomes a miss"
        )
        yield Finding(check, PROBLEM, f"{said} of {limit / 2**20:.0f}, policy {policy}", advice)
    else:
        yield Finding(check, OK, f"{said} of {limit / 2**20:.0f}, policy {policy}")


def _clock(whose: str, theirs_s: float) -> Iterator[Finding]:
    """How far another clock is from ours."""
    apart = abs(time.time() - theirs_s)
    if apart > _CLOCK_S:
        advice = "let both machines keep time by NTP: certificates, limits and traces go by it"
        yield Finding("clock", WARNING, f"{apart:.1f} s from {whose}", advice)
    else:
        yield Finding("clock", OK, f"that of this machine and {whose} agree")
