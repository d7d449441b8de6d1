"""What a running encoder and pruner make of a picture: their own processes, asked over gRPC.

So what is evaluated is the service, with every method that it has, and no copy of it. Knows no language model
and no truth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import grpc
import numpy as np
import numpy.typing as npt
import torch

from hiprune import tensors
from hiprune.calls import connect
from hiprune.stack import Stack
from hiprune.v1 import (
    encoder_service_pb2,
    encoder_service_pb2_grpc,
    media_pb2,
    pruner_service_pb2,
    pruner_service_pb2_grpc,
)

_TIMEOUT_S: Final = 300.0
_SERVICES: Final = ("encoder", "pruner")

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Kept:
    """What is left of a picture."""

    indices: torch.Tensor  # (K,) int64, ascending
    features: torch.Tensor  # (K, D)
    reads_question: bool
    """Whether another question may keep other tokens."""

    @cached_property
    def identity(self) -> bytes:
        """Equal for what answers alike."""
        digest = hashlib.sha256(self.indices.numpy().tobytes())
        digest.update(self.features.numpy().tobytes())
        return digest.digest()


@dataclass(frozen=True)
class Encoded:
    """A picture as the encoder sees it."""

    grid: tuple[int, int]
    features: torch.Tensor  # (N, D)
    scores: Mapping[int, Scores]  # 1-based layer → (N,)
    cls: Mapping[int, Scores]  # likewise, from CLS alone; empty for a tower without one


@dataclass(frozen=True)
class Services:
    """Where a running encoder and pruner are reached."""

    encoder: str
    pruner: str


@contextmanager
def services(model: str) -> Iterator[Services]:
    """Encoder and pruner on a model, as processes of this one. Raises StackError.

    One thread each, and no two pictures in one forward, so that a picture's tokens are the same bits whoever
    else is asking.
    """
    environ = {
        "HIPRUNE_ENCODER_THREADS": "1",
        "HIPRUNE_ENCODER_MAX_BATCH_PATCHES": "1",
        "HIPRUNE_PRUNER_THREADS": "1",
    }
    stack = Stack(model=model, redis=False, environ=environ)
    try:
        for service in _SERVICES:
            stack.start_service(service)
        for service in _SERVICES:
            stack.wait_ready(service)
        yield Services(stack.encoder_address, stack.pruner_address)
    finally:
        stack.stop()


class Prunings:
    """A client of both."""

    def __init__(self, running: Services, deep_layer: int) -> None:
        """To be made on the event loop that uses it. Scores are taken of all layers up to the deep one."""
        self._layers = list(range(1, deep_layer + 1))
        self._encoder = encoder_service_pb2_grpc.EncoderServiceStub(connect(running.encoder))
        self._pruner = pruner_service_pb2_grpc.PrunerServiceStub(connect(running.pruner))

    async def encoded(self, image: bytes) -> Encoded:
        """Features and the scores of every layer. Raises grpc.aio.AioRpcError."""
        request = encoder_service_pb2.EncodeImageRequest(
            media=media_pb2.Media(image=image), layers=self._layers
        )
        response = await self._encoder.EncodeImage(request, timeout=_TIMEOUT_S)
        (view,) = response.views
        scores, cls = (
            {
                entry.layer: tensors.from_proto(getattr(entry, name), field=name, shape=(None,)).numpy()
                for entry in view.attention
                if entry.HasField(name)
            }
            for name in ("scores", "cls_scores")
        )
        features = tensors.from_proto(view.features, field="features", shape=(None, None))
        return Encoded((view.grid_height, view.grid_width), features, scores, cls)

    async def pruned(self, image: bytes, policy: pruner_service_pb2.PrunePolicy, question: str) -> Kept:
        """What PruneImage leaves, as the llm would get it. Raises grpc.aio.AioRpcError."""
        request = pruner_service_pb2.PruneImageRequest(
            media=media_pb2.Media(image=image), policy=policy, question=question
        )
        response = await self._pruner.PruneImage(request, timeout=_TIMEOUT_S)
        (view,) = response.media.views
        return Kept(
            torch.tensor(view.selection.kept_indices, dtype=torch.long),
            tensors.from_proto(view.features, field="features", shape=(None, None)).float(),
            bool(response.media.summary.text_model),
        )

    async def of_scores(
        self,
        encoded: Encoded,
        policy: pruner_service_pb2.PrunePolicy,
        object_scores: Scores,
        deep_scores: Scores,
    ) -> Kept:
        """What PruneTokens keeps for scores (N,) of one's own; the question is not read."""
        view = encoder_service_pb2.View(grid_height=encoded.grid[0], grid_width=encoded.grid[1])
        for layer, scores in ((1, object_scores), (2, deep_scores)):
            tensors.fill(view.attention.add(layer=layer).scores, torch.from_numpy(scores))
        request = pruner_service_pb2.PruneTokensRequest(views=[view], policy=policy)
        response = await self._pruner.PruneTokens(request, timeout=_TIMEOUT_S)
        indices = torch.tensor(response.views[0].selection.kept_indices, dtype=torch.long)
        return Kept(indices, encoded.features[indices].float(), reads_question=False)


def failure(error: grpc.aio.AioRpcError) -> str:
    """What a failed call says, in one line."""
    return f"{error.code().name}: {error.details()}"
