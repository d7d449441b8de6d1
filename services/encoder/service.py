"""The encoder's gRPC face: decodes, calls, encodes."""

from __future__ import annotations

from typing import Any, Final

from hiprune import tensors
from hiprune.checkpoints import Checkpoint
from hiprune.errors import InvalidInput, Mismatch, Unsupported
from hiprune.telemetry import start_clock
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc, media_pb2
from services.encoder.engine import VisionEngine
from services.encoder.families import EncodedView

MAX_RATE: Final = 1000.0
"""Frames per second beyond which a rate is taken for a mistake."""


class EncoderServicer(encoder_service_pb2_grpc.EncoderServiceServicer):
    """Encodes images."""

    _checkpoint: Checkpoint
    _fingerprint: encoder_service_pb2.ModelFingerprint
    _engine: VisionEngine

    def __init__(self, max_frames: int) -> None:
        self._max_frames = max_frames

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

    async def GetEncoder(self, request: Any, context: Any) -> encoder_service_pb2.GetEncoderResponse:  # noqa: N802
        """Says which vision tower is loaded."""
        return encoder_service_pb2.GetEncoderResponse(fingerprint=self._fingerprint)

    async def EncodeImage(  # noqa: N802
        self, request: encoder_service_pb2.EncodeImageRequest, context: Any
    ) -> encoder_service_pb2.EncodeImageResponse:
        """Encodes one image into its views."""
        clock = start_clock()
        self._check(request)
        encoded = await self._engine.encode(
            request.media, request.layers, aligned=request.aligned, clock=clock
        )
        return encoder_service_pb2.EncodeImageResponse(
            views=[_to_proto(view, request) for view in encoded.views],
            fingerprint=self._fingerprint,
            timings=clock.to_proto(),
            layout=encoded.layout,
        )

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
        rate = video.frames_per_second
        if video.HasField("frames_per_second") and not 0 < rate <= MAX_RATE:
            raise InvalidInput(f"{rate} is outside (0, {MAX_RATE:g}]", field="media.video.frames_per_second")


def _to_proto(view: EncodedView, request: encoder_service_pb2.EncodeImageRequest) -> encoder_service_pb2.View:
    message = encoder_service_pb2.View(
        features=tensors.to_proto(view.features),
        attention=[
            encoder_service_pb2.LayerAttention(layer=layer, scores=tensors.to_proto(view.scores[layer]))
            for layer in request.layers
        ],
        grid_height=view.grid[0],
        grid_width=view.grid[1],
        frame=view.frame,
    )
    if view.valid is not None:
        top, left, height, width = view.valid
        message.valid.CopyFrom(
            encoder_service_pb2.ValidRegion(top=top, left=left, height=height, width=width)
        )
    if view.prefix is not None:
        message.prefix_features.CopyFrom(tensors.to_proto(view.prefix))
    if request.aligned and view.aligned is not None:
        message.aligned.CopyFrom(tensors.to_proto(view.aligned))
    return message
