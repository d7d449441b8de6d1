"""Calls to the services: channels, deadlines, retries, and errors as exceptions.

`connect` and `call` are what services use between themselves; `Client` is the library for everybody else.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc

from hiprune import deadlines, telemetry
from hiprune.errors import Internal, from_rpc
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

_SERVICE_CONFIG: Final = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        # a replica that is starting or draining gets no calls
        "healthCheckConfig": {"serviceName": ""},
        "methodConfig": [
            {
                "name": [{"service": "hiprune.v1.EncoderService"}, {"service": "hiprune.v1.PrunerService"}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)

Request = TypeVar("Request")
Response = TypeVar("Response")


def connect(address: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """A channel to HOST:PORT or unix:PATH, balanced over all replicas behind the name.

    Connects when first used. Unary calls between services are pure, so UNAVAILABLE is retried twice.
    """
    return grpc.aio.insecure_channel(
        address,
        options=[
            ("grpc.service_config", _SERVICE_CONFIG),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ],
    )


async def call(
    method: Callable[..., Any],
    request: Any,
    response_type: type[Response],
    *,
    peer: str,
    default_s: float = DEFAULT_TIMEOUT_S,
) -> Response:
    """One unary call on behalf of the current request, under what is left of its deadline.

    Raises the peer's own error, with its reason and field; Unavailable when the peer cannot be reached.
    """
    try:
        response = await method(
            request, timeout=deadlines.for_next_hop(default_s), metadata=telemetry.outgoing_metadata()
        )
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, peer=peer) from error
    if not isinstance(response, response_type):
        raise Internal(f"the {peer} answered with {type(response).__name__}")
    return response


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
    """Asks questions about images. `async with Client("127.0.0.1:50053") as client: …`."""

    def __init__(self, address: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._channel = connect(address)
        self._timeout_s = timeout_s
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
        stream = self._image_qa.AskImage(
            request,
            timeout=deadlines.for_next_hop(self._timeout_s),
            metadata=telemetry.outgoing_metadata(),
        )
        try:
            async for event in stream:
                yield event
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, peer="llm") from error
        finally:
            stream.cancel()


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
