"""The encoder as the pruner sees it: one call, its answer held against the pruner's own model.

Large answers come through shared memory where encoder and pruner have it in common, which the first answer
finds out. An answer that cannot be read from there is asked for once more, inline.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hiprune.calls import Peer
from hiprune.checkpoints import Checkpoint
from hiprune.errors import Internal, InvalidInput, Mismatch
from hiprune.shared_memory import Borrower, SegmentError
from hiprune.tensors import Memory
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc
from hiprune.workers import Workers
from services.pruner.pruning import check_views
from services.pruner.settings import Settings

log = logging.getLogger("hiprune.pruner.encoder")


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded image: from the cache, or as the encoder answered."""

    image: encoder_service_pb2.EncodeImageResponse
    """Views, fingerprint and layout: what is worth keeping of the answer."""
    memory: Memory | None = None
    """Where rows of the views lie that are not in `image`."""
    timings: Sequence[encoder_service_pb2.StageTiming] = ()

    @property
    def has_cls_scores(self) -> bool:
        """Whether attention from CLS was recorded: not without a CLS, and not by an encoder from before."""
        return any(entry.HasField("cls_scores") for view in self.image.views for entry in view.attention)


class RemoteEncoder:
    """Asks one encoder. `text_digest` is the pruner's own text model's, empty without one."""

    def __init__(
        self,
        peer: Peer[encoder_service_pb2_grpc.EncoderServiceAsyncStub],
        checkpoint: Checkpoint,
        text_digest: str,
        settings: Settings,
    ) -> None:
        self._peer = peer
        self._checkpoint = checkpoint
        self._text_digest = text_digest
        self._max_tokens = settings.max_tokens
        self._borrower = Borrower(settings.shared_memory_dir)

    async def encode(self, request: encoder_service_pb2.EncodeImageRequest, workers: Workers) -> Encoded:
        """The image, checked on `workers` as it may be large. Raises Mismatch, Internal, as `Peer.call`."""
        request.shared_memory_token = self._borrower.token
        try:
            return await self._ask(request, workers)
        except SegmentError as error:
            log.warning("asking once more, inline: the answer's shared memory cannot be used: %s", error)
        self._borrower.rest()
        request.shared_memory_token = ""
        return await self._ask(request, workers)

    async def _ask(self, request: encoder_service_pb2.EncodeImageRequest, workers: Workers) -> Encoded:
        """One call. Raises SegmentError for an answer in shared memory that is not all there."""
        image = await self._peer.call(
            lambda stub: stub.EncodeImage, request, encoder_service_pb2.EncodeImageResponse
        )
        # here and now: cancelled before a thread gets to it, nobody would remove it before the deadline
        memory = self._borrower.take(image) if request.shared_memory_token else None
        return await workers.run(lambda: self._receive(request, image, memory))

    def _receive(
        self,
        request: encoder_service_pb2.EncodeImageRequest,
        image: encoder_service_pb2.EncodeImageResponse,
        memory: Memory | None,
    ) -> Encoded:
        """The answer to a request, once all of it is here and fits. Reads files."""
        self._borrower.learn(image.shared_memory_probe)
        self._check_fingerprint(image.fingerprint, aligned=request.aligned)
        with encoders_fault():
            try:
                check_views(image.views, max_tokens=self._max_tokens, memory=memory)
            except InvalidInput as error:
                if memory is None:
                    raise
                raise SegmentError(str(error)) from error
        timings = encoder_service_pb2.EncodeImageResponse(timings=image.timings).timings
        # what belongs to this call alone is not for the cache
        image.ClearField("timings")
        image.ClearField("shared_memory_probe")
        return Encoded(image, memory, timings)

    def _check_fingerprint(self, theirs: encoder_service_pb2.ModelFingerprint, *, aligned: bool) -> None:
        """Raises Mismatch unless the encoder runs this pruner's own model."""
        ours = self._checkpoint
        pairs = [
            ("vision tower", theirs.vision_digest, ours.vision_digest),
            ("image preprocessing", theirs.preprocessing_digest, ours.preprocessing_digest),
        ]
        if aligned and self._text_digest:
            pairs.append(("text model", theirs.paired_digest, self._text_digest))
        for what, their_digest, our_digest in pairs:
            if their_digest != our_digest:
                raise Mismatch(
                    f"the encoder's {what} is {their_digest[:12] or 'absent'}, this pruner's is "
                    f"{our_digest[:12]}: start both on the same model"
                )


@contextmanager
def encoders_fault() -> Iterator[None]:
    """PruneImage's caller sends no views: one that does not fit is the encoder's, and so Internal."""
    try:
        yield
    except InvalidInput as error:
        if not error.field.startswith("views"):
            raise
        raise Internal("the encoder's answer cannot be used; the service's log has the cause") from error
