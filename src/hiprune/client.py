"""Calls to the services: channels, deadlines, retries, and errors as exceptions.

`connect` and `call` are what services use between themselves; `Client` is the library for everybody else.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

import grpc

from hiprune import auth, deadlines, telemetry
from hiprune.config import ProcessSettings, ServiceSettings
from hiprune.errors import NO_RETRY, Internal, PermissionDenied, Unauthenticated, from_rpc
from hiprune.trust import LOOK_EVERY_S, Certificates
from hiprune.v1 import (
    llm_service_pb2,
    llm_service_pb2_grpc,
    media_pb2,
    pruner_service_pb2,
)

DEFAULT_TIMEOUT_S: Final = 60.0
MAX_MESSAGE_BYTES: Final = 256 * 2**20
CACHE_WORDS: Final = {
    number: name.removeprefix("CACHE_STATUS_").lower().replace("_", " ")
    for name, number in pruner_service_pb2.CacheStatus.items()
}
"""What people call each level of the cache: "miss", "encoded hit", "pruned hit"."""

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


@dataclass(slots=True)
class Answer:
    """A whole answer. `report` says what was kept, `completion` how it ended and what it took.

    `first_text_s` and `total_s` are seconds from the call to the first text and to the end, as seen here.
    """

    text: str = ""
    report: llm_service_pb2.PruningReport = field(default_factory=llm_service_pb2.PruningReport)
    completion: llm_service_pb2.Completion = field(default_factory=llm_service_pb2.Completion)
    first_text_s: float = 0.0
    total_s: float = 0.0


class Client:
    """Asks questions about images. `async with Client("127.0.0.1:50053", key=key) as client: …`."""

    def __init__(
        self,
        address: str,
        *,
        key: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """`key` is a tenant's, where the service has tenants; `credentials` turn TLS on.

        `Certificates(authority="ca.crt").channel_credentials()`, of `hiprune.trust`, makes them of files. A
        key is as safe as the way it takes: beyond one machine, that takes TLS. Raises Unauthenticated for one
        that cannot be sent.
        """
        if not (key.isascii() and key.isprintable()):
            raise Unauthenticated("the key holds characters that no key has")
        self._channel = connect(address, credentials=credentials)
        self._timeout_s = timeout_s
        self._credentials = ((auth.KEY_HEADER, f"Bearer {key}"),) if key else ()
        self._image_qa = llm_service_pb2_grpc.ImageQaServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; running calls are cancelled."""
        await self._channel.close()

    async def ask(
        self,
        question: str,
        *media: bytes | media_pb2.Media,
        policy: pruner_service_pb2.PrunePolicy | None = None,
        sampling: llm_service_pb2.Sampling | None = None,
        model: str = "",
        on_delta: Callable[[str], object] | None = None,
    ) -> Answer:
        """The whole answer to a question about encoded images or a `video`.

        `on_delta` sees its text as it comes.

        Raises HipruneError.
        """
        answer = Answer()
        begun = time.perf_counter()
        request = llm_service_pb2.AskImageRequest(
            messages=[question_message(question, media)], policy=policy, sampling=sampling, model=model
        )
        async for event in self.ask_stream(request):
            match event.WhichOneof("event"):
                case "report":
                    answer.report = event.report
                case "delta":
                    answer.first_text_s = answer.first_text_s or time.perf_counter() - begun
                    answer.text += event.delta.text
                    if on_delta is not None:
                        on_delta(event.delta.text)
                case "completion":
                    answer.completion = event.completion
        answer.total_s = time.perf_counter() - begun
        return answer

    async def ask_stream(
        self, request: llm_service_pb2.AskImageRequest
    ) -> AsyncIterator[llm_service_pb2.AskImageResponse]:
        """The events of an answer as they come: the report, deltas, the completion. Raises HipruneError.

        Leaving the loop early cancels the answer.
        """
        timeout_s = deadlines.for_next_hop(self._timeout_s)
        try:
            with telemetry.Call(request) as trace_context:
                metadata = (*trace_context, *self._credentials)
                stream = self._image_qa.AskImage(request, timeout=timeout_s, metadata=metadata)
                try:
                    async for event in stream:
                        yield event
                finally:
                    stream.cancel()
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, peer="llm") from error


def question_message(question: str, media: Sequence[bytes | media_pb2.Media]) -> llm_service_pb2.Message:
    """A user's turn: the encoded images and other media, then the words."""
    items = (media_pb2.Media(image=each) if isinstance(each, bytes) else each for each in media)
    parts = [llm_service_pb2.Part(media=each) for each in items]
    if question:
        parts.append(llm_service_pb2.Part(text=question))
    return llm_service_pb2.Message(role=llm_service_pb2.ROLE_USER, parts=parts)


def video(frames: Iterable[bytes], frames_per_second: float | None = None) -> media_pb2.Media:
    """A video of encoded images, in time order and of one size, sampled at a rate; None: the service's 2."""
    return media_pb2.Media(video=media_pb2.Video(frames=frames, frames_per_second=frames_per_second))
