"""The two gRPC services: decode, call, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from hiprune import auth, quotas, telemetry
from hiprune.allowances import check_media
from hiprune.errors import Internal, InvalidInput, Mismatch
from hiprune.v1 import (
    encoder_service_pb2,
    llm_service_pb2,
    llm_service_pb2_grpc,
    pruner_service_pb2,
)
from services.llm.pipeline import Event, LanguageModel, Request
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
        async with model.slots.take():
            await _reserve(media)
            async with aclosing(_answer(model, checked, media, clock)) as events:
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
            adapters=model.adapters,
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
        tenant = auth.current().tenant
        if tenant.limits.bounds_images:
            await asyncio.to_thread(_check_media, checked, tenant.limits)
        # the slot first: no image is encoded for an answer that has to wait
        async with model.slots.take():
            policy = tenant.complete(request.policy)
            pruned, report = await self._pruner().prune(checked.prompt.media, policy)
            media = await asyncio.to_thread(lambda: [_from_pruner(model, each) for each in pruned])
            await _reserve(media)
            yield llm_service_pb2.AskImageResponse(report=report)
            async with aclosing(_answer(model, checked, media, clock)) as events:
                async for event in events:
                    if isinstance(event, llm_service_pb2.TextDelta):
                        yield llm_service_pb2.AskImageResponse(delta=event)
                    else:
                        yield llm_service_pb2.AskImageResponse(completion=event)


def _check_media(request: Request, limits: auth.Limits) -> None:
    """Refuses what is larger than its tenant may send. Blocks. Raises InvalidInput."""
    for item in request.prompt.media:
        check_media(item.part.media, limits, field=f"{item.field}.media")


async def _reserve(media: Sequence[VisualTokens]) -> None:
    """Counts the tokens that were kept, before the language model reads them. Raises Exhausted (QUOTA)."""
    await quotas.current().reserve(
        sum(each.tokens_kept for each in media), sum(each.tokens_before for each in media)
    )


async def _answer(
    model: LanguageModel, request: Request, media: Sequence[VisualTokens], clock: telemetry.StageClock
) -> AsyncGenerator[Event, None]:
    """The model's answer; from its first event on, what the tenant was charged stays charged."""
    async with aclosing(model.answer(request, media, clock)) as events:
        async for event in events:
            quotas.current().keep()
            yield event


def _from_pruner(model: LanguageModel, media: pruner_service_pb2.PrunedMedia) -> VisualTokens:
    """The pruner's answer as tokens. What is wrong with it is not the client's doing: no field of theirs."""
    try:
        return model.read_pruned(media, "media")
    except Mismatch as error:
        raise Mismatch(f"the pruner serves another model: {error.message}") from error
    except InvalidInput as error:
        raise Internal(f"the pruner's answer cannot be used: {error}") from error
