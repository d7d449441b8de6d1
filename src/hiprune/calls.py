"""Calls to the services: channels, deadlines, retries, and errors as exceptions.

What services use between themselves, and what the library for everybody else, `hiprune.client`, stands on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import grpc

from hiprune import auth, deadlines, telemetry
from hiprune.config import ProcessSettings, ServiceSettings
from hiprune.errors import NO_RETRY, Internal, PermissionDenied, Unauthenticated, from_rpc
from hiprune.trust import LOOK_EVERY_S, Certificates

DEFAULT_TIMEOUT_S: Final = 60.0
MAX_MESSAGE_BYTES: Final = 256 * 2**20

_PING_MS: Final = 10_000
"""How long nothing may be heard on a connection before it is asked whether anybody is there. Above what
`hiprune.server` allows."""
_PONG_MS: Final = 10_000
"""Time for the answer: then the connection is given up, its calls are UNAVAILABLE, and a new one is made."""

_ATTEMPTS: Final = 3
_RETRIES_A_FAILURE: Final = {"maxTokens": 50, "tokenRatio": 0.5}
"""gRFC A6: a failure takes a token, a success gives half a one, and with fewer than 25 nothing is retried:
a service that is down is not asked three times by everybody."""
_RETRIED_BETWEEN_SERVICES: Final = ("hiprune.v1.EncoderService", "hiprune.v1.PrunerService")
_RETRIED: Final = ("hiprune.v1.ImageQaService",)

Request = TypeVar("Request")
Response = TypeVar("Response")
Stub = TypeVar("Stub")


def connect(
    address: str,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    credentials: grpc.ChannelCredentials | None = None,
) -> grpc.aio.Channel:
    """A channel to HOST:PORT or unix:PATH, balanced over all replicas behind the name.

    Connects when first used, with TLS where `credentials` are given.

    UNAVAILABLE is retried twice, on another replica where there is one, and a stream only before its first
    event: what is asked here changes nothing, and nothing is charged for what was UNAVAILABLE. Done at each
    hop that would be three times three attempts. So a service that has retried tells its caller not to
    (`NO_RETRY`); and on a Unix socket, behind which there is one process and no replica, services do not
    retry but pass on what they get: their own callers may know a replica that has another behind its socket.
    """
    options = [
        ("grpc.service_config", _service_config(between_services=not auth.is_unix(address))),
        # a call whose messages are larger is never retried, by default from 256 KiB on: a photo's size
        ("grpc.per_rpc_retry_buffer_size", min(max_message_bytes + 2**16, 2**31 - 1)),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # a machine that is gone says nothing: without these, calls would go on into the void for minutes
        ("grpc.keepalive_time_ms", _PING_MS),
        ("grpc.keepalive_timeout_ms", _PONG_MS),
        ("grpc.http2.ping_timeout_ms", _PONG_MS),  # of whichever ping is on its way by then; else a minute
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def _service_config(*, between_services: bool) -> str:
    """What gRPC is to do by itself, in its JSON."""
    retried = (*_RETRIED, *_RETRIED_BETWEEN_SERVICES) if between_services else _RETRIED
    return json.dumps(
        {
            "loadBalancingConfig": [{"round_robin": {}}],
            # a replica that is starting or draining gets no calls
            "healthCheckConfig": {"serviceName": ""},
            "retryThrottling": _RETRIES_A_FAILURE,
            "methodConfig": [
                {
                    "name": [{"service": name} for name in retried],
                    "retryPolicy": {
                        "maxAttempts": _ATTEMPTS,
                        "initialBackoff": "0.05s",
                        "maxBackoff": "0.5s",
                        "backoffMultiplier": 2,
                        "retryableStatusCodes": ["UNAVAILABLE"],
                    },
                }
            ],
        }
    )


async def call(
    method: Callable[..., Any],
    request: Any,
    response_type: type[Response],
    *,
    peer: str,
    default_s: float = DEFAULT_TIMEOUT_S,
    metadata: tuple[tuple[str, str], ...] = (),
    retried: bool = True,
) -> Response:
    """One unary call on behalf of the current request, under what is left of its deadline.

    `retried` says that the channel does so, and the request's own caller need not.

    Raises the peer's own error, with its reason and field; Unavailable when the peer cannot be reached.
    """
    timeout_s = deadlines.for_next_hop(default_s)
    try:
        with telemetry.Call(request) as trace_context:
            response = await method(request, timeout=timeout_s, metadata=(*trace_context, *metadata))
    except grpc.aio.AioRpcError as error:
        found = from_rpc(error, peer=peer)
        found.retried = retried or NO_RETRY in map(tuple, error.trailing_metadata() or ())
        raise found from error
    if not isinstance(response, response_type):
        raise Internal(f"the {peer} answered with {type(response).__name__}")
    return response


class Line(Generic[Stub]):
    """A channel to another service, as settings have it: `line.stub()` is what to call.

    `make_stub` is its stub's class. With TLS a changed certificate gets a channel of its own, while the calls
    on the old one end in peace.
    """

    def __init__(
        self, address: str, make_stub: Callable[[grpc.aio.Channel], Stub], settings: ProcessSettings
    ) -> None:
        """Connects when first used. Raises ConfigError for certificates that cannot be used."""
        self._address = address
        self._make_stub = make_stub
        self._max_message_bytes = settings.max_message_bytes
        self._longest_s = settings.max_deadline_ms / 1000
        uses_tls = settings.tls_ca and not auth.is_unix(address)
        self._certificates = Certificates.of(settings) if uses_tls else None
        self._leaving: set[asyncio.Task[None]] = set()
        self._connect()

    def stub(self) -> Stub:
        """What to call, on a new channel when the certificates have changed."""
        if self._certificates is not None:
            self._certificates.look(at_most_every_s=LOOK_EVERY_S)
            if self._certificates.generation != self._generation:
                closing = asyncio.create_task(self._channel.close(grace=self._longest_s))
                self._leaving.add(closing)
                closing.add_done_callback(self._leaving.discard)
                self._connect()
        return self._stub

    async def close(self) -> None:
        """Closes the channel; running calls are cancelled."""
        await self._channel.close()
        for each in self._leaving:
            each.cancel()

    def _connect(self) -> None:
        files = self._certificates
        self._generation = files.generation if files else 0
        self._channel = connect(
            self._address,
            max_message_bytes=self._max_message_bytes,
            credentials=files.channel_credentials() if files else None,
        )
        self._stub = self._make_stub(self._channel)


class Peer(Line[Stub]):
    """Another service, as this one calls it: for the tenant whose request is being served, and as a peer."""

    def __init__(
        self,
        name: str,
        address: str,
        make_stub: Callable[[grpc.aio.Channel], Stub],
        settings: ServiceSettings,
    ) -> None:
        """See `Line`."""
        super().__init__(address, make_stub, settings)
        self._name = name
        self._default_s = settings.default_deadline_ms / 1000
        self._token = settings.peer_token.get_secret_value()
        self._is_known = settings.is_known_at(address)

    async def call(
        self, method: Callable[[Stub], Callable[..., Any]], request: Any, response_type: type[Response]
    ) -> Response:
        """One call: `await encoder.call(lambda stub: stub.EncodeImage, request, EncodeImageResponse)`.

        Raises as `call` does, and Internal where the peer does not take this service for one.
        """
        try:
            return await call(
                method(self.stub()),
                request,
                response_type,
                peer=self._name,
                default_s=self._default_s,
                metadata=self._introduction(),
                retried=not auth.is_unix(self._address),
            )
        except (PermissionDenied, Unauthenticated) as error:
            # between services it is not the client who lacks a right, but the two that lack a common secret
            raise Internal(f"the {self._name} does not trust this service; the log has its reason") from error

    def _introduction(self) -> tuple[tuple[str, str], ...]:
        """Who calls, and for whom. A tenant is named to those alone who have a reason to believe it."""
        said = []
        if self._token:
            said.append((auth.PEER_HEADER, self._token))
        if self._is_known:
            said.append((auth.TENANT_HEADER, auth.current().tenant.name))
        return tuple(said)
