"""The encoder's gRPC face: decodes, calls, encodes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch

from hiprune import auth, deadlines, tensors
from hiprune.allowances import check_media
from hiprune.checkpoints import Checkpoint
from hiprune.errors import InvalidInput, Mismatch, Unsupported
from hiprune.shared_memory import Lender, Loan
from hiprune.telemetry import start_clock
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc, media_pb2, tensor_pb2
from services.encoder.engine import Encoded, VisionEngine
from services.encoder.families import EncodedView
from services.encoder.settings import Settings

log = logging.getLogger("hiprune.encoder")

MAX_RATE: Final = 1000.0
"""Frames per second beyond which a rate is taken for a mistake."""
_THREAD_BYTES: Final = 256 * 1024
"""Answers above it are put together off the event loop."""


class EncoderServicer(encoder_service_pb2_grpc.EncoderServiceServicer):
    """Encodes images."""

    _checkpoint: Checkpoint
    _fingerprint: encoder_service_pb2.ModelFingerprint
    _engine: VisionEngine

    def __init__(self, settings: Settings) -> None:
        self._max_frames = settings.max_frames
        self._max_video_bytes = settings.max_video_bytes
        self._lender = Lender(settings.shared_memory_dir, max_bytes=settings.shared_memory_bytes)
        self._lends_from = settings.shared_memory_min_bytes
        self._call_s = settings.default_deadline_ms / 1000
        # threads of our own: asyncio's default ones may all be waiting for a name server
        self._writers = ThreadPoolExecutor(2, thread_name_prefix="answer")

    def equip(
        self,
        checkpoint: Checkpoint,
        fingerprint: encoder_service_pb2.ModelFingerprint,
        engine: VisionEngine,
    ) -> None:
        """Gives it what it works with; no request arrives before (see `hiprune.server.RequestGate`)."""
        self._checkpoint = checkpoint
        self._fingerprint = fingerprint
        self._engine = engine
        self._lender.open()

    async def close(self) -> None:
        """Removes what is lent and was not taken."""
        await self._lender.close()
        self._writers.shutdown(wait=False)

    async def GetEncoder(self, request: Any, context: Any) -> encoder_service_pb2.GetEncoderResponse:  # noqa: N802
        """Says which vision tower is loaded."""
        return encoder_service_pb2.GetEncoderResponse(fingerprint=self._fingerprint)

    async def EncodeImage(  # noqa: N802
        self, request: encoder_service_pb2.EncodeImageRequest, context: Any
    ) -> encoder_service_pb2.EncodeImageResponse:
        """Encodes one image into its views."""
        clock = start_clock()
        self._check(request)
        limits = auth.current().tenant.limits
        if limits.bounds_images:
            await asyncio.to_thread(check_media, request.media, limits, field="media")
        encoded = await self._engine.encode(
            request.media, request.layers, aligned=request.aligned, clock=clock
        )
        response = encoder_service_pb2.EncodeImageResponse(
            fingerprint=self._fingerprint, layout=encoded.layout
        )
        await self._add_views(response, encoded, request, context)
        response.timings.extend(clock.to_proto())
        return response

    async def _add_views(
        self,
        response: encoder_service_pb2.EncodeImageResponse,
        encoded: Encoded,
        request: encoder_service_pb2.EncodeImageRequest,
        context: Any,
    ) -> None:
        """Puts the views into the answer; their rows into shared memory where it pays and the caller can."""
        rows = [tensor for view in encoded.views for tensor in _rows_of(view, request.aligned)]
        size = Loan.size_of(rows)
        loan = None
        if context.peer().startswith("unix"):  # unix: and unix-abstract:
            if not self._lender.admits(request.shared_memory_token):
                response.shared_memory_probe = self._lender.probe
            elif size >= self._lends_from:
                loan = self._lender.lend(size)
        loop = asyncio.get_running_loop()
        if loan is None:
            if size > _THREAD_BYTES:
                await loop.run_in_executor(self._writers, _fill, response, encoded, request, None)
            else:
                _fill(response, encoded, request, None)
            return
        # a client that has gone takes nothing; one that has its answer may yet, for as long as it would wait.
        # Not `cancelled`, which grpc.aio never says here
        context.add_done_callback(lambda ended: None if ended.done() else self._lender.end(loan))
        left = deadlines.remaining_s()
        loop.call_later(self._call_s if left is None else left, self._lender.end, loan)
        try:
            await loop.run_in_executor(self._writers, _fill, response, encoded, request, loan)
        except BaseException:
            self._lender.end(loan)
            raise

    def _check(self, request: encoder_service_pb2.EncodeImageRequest) -> None:
        """Refuses what this tower cannot do. Raises InvalidInput, Mismatch, Unsupported."""
        facts = self._checkpoint.facts
        kind = request.media.WhichOneof("content")
        if kind is None:
            raise InvalidInput(
                "is missing, expected an image or a video", field="media", reason="MISSING_FIELD"
            )
        if kind == "video":
            self._check_video(request.media.video)
        for place, layer in enumerate(request.layers):
            if not 1 <= layer <= facts.deep_layer:
                raise InvalidInput(
                    f"{layer} is outside [1, {facts.deep_layer}]: nothing runs behind the feature layer",
                    field=f"layers[{place}]",
                )
            if layer in request.layers[:place]:
                raise InvalidInput(f"{layer} is asked for twice", field=f"layers[{place}]")
        if request.aligned and facts.compares != "aligned":
            raise InvalidInput(
                f"the {facts.family} family's features are in the text's space themselves", field="aligned"
            )
        if request.aligned and not self._fingerprint.paired_digest:
            raise Mismatch("this encoder has no paired text encoder", field="aligned", reason="NO_TEXT_MODEL")

    def _check_video(self, video: media_pb2.Video) -> None:
        """Refuses video for an image family, and too many frames. Raises InvalidInput, Unsupported."""
        facts = self._checkpoint.facts
        if not facts.takes_video:
            raise Unsupported(f"the {facts.family} family takes images, not video", field="media.video")
        if not 1 <= len(video.frames) <= self._max_frames:
            raise InvalidInput(
                f"{len(video.frames)} frames, expected 1 to {self._max_frames}", field="media.video.frames"
            )
        size = sum(len(frame) for frame in video.frames)
        if size > self._max_video_bytes:
            raise InvalidInput(
                f"{size} bytes, expected at most {self._max_video_bytes} in all frames together",
                field="media.video.frames",
                reason="LIMIT_EXCEEDED",
            )
        rate = video.frames_per_second
        if video.HasField("frames_per_second") and not 0 < rate <= MAX_RATE:
            raise InvalidInput(f"{rate} is outside (0, {MAX_RATE:g}]", field="media.video.frames_per_second")


def _rows_of(view: EncodedView, aligned: bool) -> list[torch.Tensor]:
    """What of a view is large: a row a token."""
    return [view.features] + ([view.aligned] if aligned and view.aligned is not None else [])


def _fill(
    response: encoder_service_pb2.EncodeImageResponse,
    encoded: Encoded,
    request: encoder_service_pb2.EncodeImageRequest,
    loan: Loan | None,
) -> None:
    """Adds the views, their rows in the loan if there is one and the memory for it; else inline."""
    rows: list[tuple[tensor_pb2.Tensor, torch.Tensor]] = []
    for view in encoded.views:
        message = response.views.add()
        _describe(view, request.layers, message)
        targets = (message.features, message.aligned)
        rows += zip(targets, _rows_of(view, request.aligned), strict=False)  # without aligned: features alone
    if loan is not None:
        try:
            loan.write(rows)
            return
        except OSError as error:
            if loan.has_ended:  # and with it the call: nobody reads the answer
                return
            log.warning("%d bytes go inline, shared memory takes none: %s", loan.size, error)
            loan.end()
    for target, tensor in rows:
        tensors.fill(target, tensor)


def _describe(view: EncodedView, layers: Iterable[int], message: encoder_service_pb2.View) -> None:
    """All of a view but its rows."""
    message.grid_height, message.grid_width = view.grid
    message.frame = view.frame
    for layer in layers:
        entry = message.attention.add(layer=layer)
        tensors.fill(entry.scores, view.scores[layer])
        if layer in view.cls_scores:
            tensors.fill(entry.cls_scores, view.cls_scores[layer])
    if view.valid is not None:
        top, left, height, width = view.valid
        message.valid.CopyFrom(
            encoder_service_pb2.ValidRegion(top=top, left=left, height=height, width=width)
        )
    if view.prefix is not None:
        tensors.fill(message.prefix_features, view.prefix)
