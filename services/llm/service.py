"""The two gRPC services: decode, call, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc

from hiprune import telemetry
from hiprune.errors import Internal, InvalidInput, Mismatch
from hiprune.v1 import (
    encoder_service_pb2,
    llm_service_pb2,
    llm_service_pb2_grpc,
    pruner_service_pb2,
)
from services.llm.pipeline import LanguageModel
from services.llm.pruner import Pruner
from services.llm.visual import VisualTokens

Context = grpc.aio.ServicerContext[Any, Any]
"""gRPC's own; unused here."""


class LanguageModelServicer(llm_service_pb2_grpc.LanguageModelServiceServicer):
    """The language model alone. `loaded` gives it once the service is ready."""

    def __init__(self, loaded: Callable[[], LanguageModel]) -> None:
        self._loaded = loaded

    async def GenerateText(  # noqa: N802 - the proto's name
        self, request: llm_service_pb2.GenerateTextRequest, context: Context
    ) -> AsyncIterator[llm_service_pb2.GenerateTextResponse]:
        """Answers from tokens that were pruned before."""
        model, clock = self._loaded(), telemetry.start_clock()
        checked = await asyncio.to_thread(
            model.read, request.messages, request.sampling, request.model, media="pruned_media"
        )
        media = await asyncio.to_thread(
            lambda: [
                model.read_pruned(item.part.pruned_media, f"{item.field}.pruned_media")
                for item in checked.prompt.media
            ]
        )
        async with model.slots.take(), aclosing(model.answer(checked, media, clock)) as events:
            async for event in events:
                if isinstance(event, llm_service_pb2.TextDelta):
                    yield llm_service_pb2.GenerateTextResponse(delta=event)
                else:
                    yield llm_service_pb2.GenerateTextResponse(completion=event)

    async def GetLanguageModel(  # noqa: N802
        self, request: llm_service_pb2.GetLanguageModelRequest, context: Context
    ) -> llm_service_pb2.GetLanguageModelResponse:
        """Says which language model is loaded."""
        model = self._loaded()
        facts = model.checkpoint.facts
        return llm_service_pb2.GetLanguageModelResponse(
            model=model.name,
            fingerprint=encoder_service_pb2.ModelFingerprint(
                family=facts.family,
                vision_digest=model.checkpoint.vision_digest,
                preprocessing_digest=model.checkpoint.preprocessing_digest,
                hidden_size=facts.hidden_size,
                layers=facts.layers,
            ),
            engine=model.engine.name,
            context_length=model.engine.context_length,
        )


class ImageQaServicer(llm_service_pb2_grpc.ImageQaServiceServicer):
    """The front door. `loaded` and `pruner` give what it needs once the service is ready."""

    def __init__(self, loaded: Callable[[], LanguageModel], pruner: Callable[[], Pruner]) -> None:
        self._loaded = loaded
        self._pruner = pruner

    async def AskImage(  # noqa: N802
        self, request: llm_service_pb2.AskImageRequest, context: Context
    ) -> AsyncIterator[llm_service_pb2.AskImageResponse]:
        """Answers a question about images: the report, deltas, the completion."""
        model, clock = self._loaded(), telemetry.start_clock()
        checked = await asyncio.to_thread(
            model.read, request.messages, request.sampling, request.model, media="media"
        )
        # the slot first: no image is encoded for an answer that has to wait
        async with model.slots.take():
            pruned, report = await self._pruner().prune(checked.prompt.media, request.policy)
            media = await asyncio.to_thread(lambda: [_from_pruner(model, each) for each in pruned])
            yield llm_service_pb2.AskImageResponse(report=report)
            async with aclosing(model.answer(checked, media, clock)) as events:
                async for event in events:
                    if isinstance(event, llm_service_pb2.TextDelta):
                        yield llm_service_pb2.AskImageResponse(delta=event)
                    else:
                        yield llm_service_pb2.AskImageResponse(completion=event)


def _from_pruner(model: LanguageModel, media: pruner_service_pb2.PrunedMedia) -> VisualTokens:
    """The pruner's answer as tokens. What is wrong with it is not the client's doing: no field of theirs."""
    try:
        return model.read_pruned(media, "media")
    except Mismatch as error:
        raise Mismatch(f"the pruner serves another model: {error.message}") from error
    except InvalidInput as error:
        raise Internal(f"the pruner's answer cannot be used: {error}") from error
