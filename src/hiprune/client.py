"""The client library: questions about images, and pruning and encoding alone, over gRPC.

Asynchronous, typed, and without torch or numpy: what a call takes and gives is in `hiprune.results`, tensors
in `hiprune.arrays`. Channels, retries and deadlines are `hiprune.calls`'s. The exceptions stand in the
docstring of `hiprune`.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self

import grpc

from hiprune import auth, deadlines, telemetry
from hiprune.arrays import ArrayLike, Shape, to_wire
from hiprune.calls import DEFAULT_TIMEOUT_S, call, connect
from hiprune.errors import InvalidInput, Unauthenticated, from_rpc
from hiprune.questions import made, media_of, question_message, video
from hiprune.results import Answer, Encoded, EncodedView, Pruned, View
from hiprune.v1 import (
    encoder_service_pb2,
    encoder_service_pb2_grpc,
    llm_service_pb2,
    llm_service_pb2_grpc,
    media_pb2,
    pruner_service_pb2,
    pruner_service_pb2_grpc,
)

__all__ = ["Answer", "Client", "question_message", "video"]

DEFAULT_ADDRESS: Final = "127.0.0.1:50053"
DEFAULT_PRUNER_ADDRESS: Final = "127.0.0.1:50052"
DEFAULT_ENCODER_ADDRESS: Final = "127.0.0.1:50051"
_LONGEST_S: Final = 10**9
"""Thirty years; what is much longer overflows gRPC's deadline and would be over at once."""


class Client:
    """Asks questions about images. `async with Client("127.0.0.1:50053", key=key) as client: …`.

    `prune` and `prune_tokens` need the pruner's address, and `encode` the encoder's:
    `Client(pruner="127.0.0.1:50052", encoder="127.0.0.1:50051")`.

    Every method takes `timeout_s`, the seconds after which it raises Expired wherever the request is by then;
    without, the client's own. Cancelling the task that awaits a call, or leaving the loop over a stream,
    stops the work in every service. UNAVAILABLE is retried twice, on another replica where there is one, and
    a stream only before its first event (at a unix:PATH, `prune`, `prune_tokens` and `encode` are not);
    Exhausted is not, and says in `retry_after_s` when to come back.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        pruner: str = "",
        encoder: str = "",
        key: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Connects when first used, in that call's event loop. Addresses are HOST:PORT or unix:PATH;
        `address` is the llm's.

        `key` is a tenant's, where the service has tenants; `credentials` turn TLS on.
        `Certificates(authority="ca.crt").channel_credentials()`, of `hiprune.trust`, makes them of files. A
        key is as safe as the way it takes: beyond one machine, that takes TLS. Raises Unauthenticated for one
        that cannot be sent, and InvalidInput.
        """
        if not auth.can_be_sent(key):
            raise Unauthenticated("the key holds characters that no key has")
        self._timeout_s = _checked_timeout(timeout_s)
        self._credentials = ((auth.KEY_HEADER, f"Bearer {key}"),) if key else ()
        self._tls = credentials
        self._addresses = {"address": address, "pruner": pruner, "encoder": encoder}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channels; running calls are cancelled."""
        self._is_closed = True
        for channel in self._channels.values():
            await channel.close()

    # --- answers -------------------------------------------------------------------------------------------

    async def ask(
        self,
        question: str,
        *media: bytes | media_pb2.Media,
        policy: pruner_service_pb2.PrunePolicy | None = None,
        sampling: llm_service_pb2.Sampling | None = None,
        model: str = "",
        on_delta: Callable[[str], object] | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """The whole answer to a question about encoded images or a `video`.

        `policy` and `sampling` are what `hiprune.policy` and `hiprune.sampling` make; `on_delta` sees the
        text as it comes.

        Raises HipruneError.
        """
        answer = Answer()
        begun = time.perf_counter()
        async for event in self.ask_stream(
            question, *media, policy=policy, sampling=sampling, model=model, timeout_s=timeout_s
        ):
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
        self,
        question: str | llm_service_pb2.AskImageRequest,
        *media: bytes | media_pb2.Media,
        policy: pruner_service_pb2.PrunePolicy | None = None,
        sampling: llm_service_pb2.Sampling | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> AsyncIterator[llm_service_pb2.AskImageResponse]:
        """The events of an answer as they come: one `report`, `delta`s, last the `completion`.

        Takes what `ask` takes, or a request of the wire, alone, for a conversation of several turns. Leaving
        the loop early cancels the answer. Raises HipruneError.
        """
        if isinstance(question, llm_service_pb2.AskImageRequest):
            request = question
        else:
            request = made(
                llm_service_pb2.AskImageRequest,
                messages=[question_message(question, media)],
                policy=policy,
                sampling=sampling,
                model=model,
            )
        stub = llm_service_pb2_grpc.ImageQaServiceStub(self._channel("address", "ask", DEFAULT_ADDRESS))
        seconds = deadlines.for_next_hop(self._seconds(timeout_s))
        try:
            with telemetry.Call(request) as trace_context:
                metadata = (*trace_context, *self._credentials)
                stream = stub.AskImage(request, timeout=seconds, metadata=metadata)
                try:
                    async for event in stream:
                        yield event
                finally:
                    stream.cancel()
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, peer="llm") from error

    # --- the stages alone ----------------------------------------------------------------------------------

    async def prune(
        self,
        media: bytes | media_pb2.Media,
        *,
        policy: pruner_service_pb2.PrunePolicy | None = None,
        question: str = "",
        timeout_s: float | None = None,
    ) -> Pruned:
        """Which visual tokens of an image or `video` are kept, and the tokens: encoded, or from the cache.

        `question` is what hiprune++ compares the tokens with. Raises HipruneError.
        """
        channel = self._channel("pruner", "prune", DEFAULT_PRUNER_ADDRESS)
        stub = pruner_service_pb2_grpc.PrunerServiceStub(channel)
        request = made(
            pruner_service_pb2.PruneImageRequest, media=media_of(media), policy=policy, question=question
        )
        kind = pruner_service_pb2.PruneImageResponse
        return Pruned.of_image(await self._call(stub.PruneImage, request, kind, "pruner", timeout_s))

    async def prune_tokens(
        self,
        views: View | EncodedView | Encoded | Sequence[View | EncodedView],
        *,
        policy: pruner_service_pb2.PrunePolicy | None = None,
        question: str = "",
        text_vector: ArrayLike | None = None,
        similarity: ArrayLike | Sequence[ArrayLike] | None = None,
        vision_digest: str = "",
        deep_layer: int | None = None,
        timeout_s: float | None = None,
    ) -> Pruned:
        """Prunes tokens that the caller has, of any encoder: no service encodes anything.

        At most one of these guides hiprune++: a `question`, for tokens of the pruner's own tower, whose
        `vision_digest` says so (what `encode` gave brings it along); a `text_vector` (A,), compared with
        `aligned`, else with `features`; or a `similarity` of every token, (N,), of several views a list of
        those. `deep_layer`,
        from 1 on, is by default the last one in each view's `attention`.

        Raises InvalidInput, before anything is sent, for an array that does not fit, and HipruneError.
        """
        channel = self._channel("pruner", "prune_tokens", DEFAULT_PRUNER_ADDRESS)
        stub = pruner_service_pb2_grpc.PrunerServiceStub(channel)
        if isinstance(views, Encoded):
            vision_digest = vision_digest or views.vision_digest
            views = views.views
        given = [views] if isinstance(views, View | EncodedView) else list(views)
        guides = {"question": question or None, "text_vector": text_vector, "similarity": similarity}
        named = [name for name, value in guides.items() if value is not None]
        if len(named) > 1:
            raise InvalidInput(f"given beside {named[0]}, expected one of them at most", field=named[1])
        request = made(
            pruner_service_pb2.PruneTokensRequest,
            views=[_view_to_wire(view, f"views[{i}]") for i, view in enumerate(given)],
            policy=policy,
            vision_digest=vision_digest,
            deep_layer=deep_layer,
            question=question or None,
        )
        if text_vector is not None:
            rank = len(getattr(text_vector, "shape", ()))
            shape: Shape = (1, None) if rank == 2 else (None,)
            request.text_vector.CopyFrom(to_wire(text_vector, name="text_vector", shape=shape))
        if similarity is not None:
            if not isinstance(similarity, Sequence):
                similarity = [similarity]
            if len(similarity) != len(given):
                raise InvalidInput(f"{len(similarity)} vectors for {len(given)} views", field="similarity")
            for i, (each, view) in enumerate(zip(similarity, given, strict=True)):
                shape = (math.prod(view.grid),)
                request.similarity.views.append(
                    to_wire(each, name=f"similarity[{i}]", shape=shape, as_float32=True)
                )
        kind = pruner_service_pb2.PruneTokensResponse
        return Pruned.of_tokens(await self._call(stub.PruneTokens, request, kind, "pruner", timeout_s))

    async def encode(
        self,
        media: bytes | media_pb2.Media,
        *,
        layers: Sequence[int] = (),
        aligned: bool = False,
        timeout_s: float | None = None,
    ) -> Encoded:
        """The visual tokens of an image or `video`, before the projector and unpruned.

        `layers`, from 1 on, are those whose attention scores are wanted; `aligned` asks for each token in the
        paired text encoder's space, too. Raises HipruneError.
        """
        channel = self._channel("encoder", "encode", DEFAULT_ENCODER_ADDRESS)
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        request = made(
            encoder_service_pb2.EncodeImageRequest, media=media_of(media), layers=layers, aligned=aligned
        )
        kind = encoder_service_pb2.EncodeImageResponse
        return Encoded.read(await self._call(stub.EncodeImage, request, kind, "encoder", timeout_s))

    def _channel(self, name: str, method: str, example: str) -> grpc.aio.Channel:
        """To one of the addresses. Made when first asked for: it belongs to the event loop that runs then."""
        where = self._addresses[name]
        if self._is_closed:
            raise InvalidInput(f"is closed, and `{method}` needs an open one: make another", field="client")
        if not where:
            raise InvalidInput(
                f"is not set, and `{method}` needs it: Client({name}={example!r})",
                field=name,
                reason="MISSING_FIELD",
            )
        if name not in self._channels:
            # a Unix socket stays on the machine and never speaks TLS
            credentials = None if auth.is_unix(where) else self._tls
            self._channels[name] = connect(where, credentials=credentials)
        return self._channels[name]

    async def _call(self, method: Any, request: Any, kind: Any, peer: str, timeout_s: float | None) -> Any:
        seconds = self._seconds(timeout_s)
        return await call(method, request, kind, peer=peer, default_s=seconds, metadata=self._credentials)

    def _seconds(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else _checked_timeout(timeout_s)


def _view_to_wire(view: View | EncodedView, name: str) -> encoder_service_pb2.View:
    """A caller's view, once its arrays fit its grid. Raises InvalidInput naming the array."""
    try:
        height, width = map(operator.index, view.grid)
    except (TypeError, ValueError) as error:
        message = f"got {view.grid!r}, expected rows and columns, two whole numbers"
        raise InvalidInput(message, field=f"{name}.grid") from error
    if height < 1 or width < 1:
        raise InvalidInput(f"got {view.grid}, expected at least (1, 1)", field=f"{name}.grid")
    count = height * width
    sent = made(
        encoder_service_pb2.View, at=f"{name}.", grid_height=height, grid_width=width, frame=view.frame
    )
    for part in ("features", "aligned", "prefix_features"):
        value = getattr(view, part)
        if value is not None:
            rows = None if part == "prefix_features" else count
            getattr(sent, part).CopyFrom(to_wire(value, name=f"{name}.{part}", shape=(rows, None)))
    for layer, scores in view.attention.items():
        field = f"{name}.attention[{layer}]"
        wire = to_wire(scores, name=field, shape=(count,), as_float32=True)
        entry = made(encoder_service_pb2.LayerAttention, at=f"{name}.attention: ", layer=layer, scores=wire)
        sent.attention.append(entry)
        if layer in view.cls_attention:
            field = f"{name}.cls_attention[{layer}]"
            row = to_wire(view.cls_attention[layer], name=field, shape=(count,), as_float32=True)
            sent.attention[-1].cls_scores.CopyFrom(row)
    if apart := sorted(set(view.cls_attention) - set(view.attention)):
        raise InvalidInput(
            f"got layers {apart}, expected layers of attention: {sorted(view.attention)}",
            field=f"{name}.cls_attention",
        )
    if view.valid is not None:
        try:
            top, left, rows, columns = view.valid
        except (TypeError, ValueError) as error:
            message = f"got {view.valid!r}, expected first row, first column, rows and columns"
            raise InvalidInput(message, field=f"{name}.valid") from error
        region = encoder_service_pb2.ValidRegion
        valid = made(region, at=f"{name}.valid.", top=top, left=left, height=rows, width=columns)
        sent.valid.CopyFrom(valid)
    return sent


def _checked_timeout(timeout_s: float) -> float:
    try:
        fits = 0 < timeout_s <= _LONGEST_S
    except TypeError:
        fits = False
    if not fits:
        raise InvalidInput(f"got {timeout_s!r}, expected seconds in (0, {_LONGEST_S}]", field="timeout_s")
    return timeout_s
