"""A gateway in this process, and an llm behind it that answers by a script: real HTTP and gRPC, no model."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import grpc
import uvicorn
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from hiprune.errors import HipruneError, Unauthenticated, to_status
from hiprune.v1 import encoder_service_pb2, llm_service_pb2_grpc, pruner_service_pb2, tensor_pb2
from hiprune.v1 import llm_service_pb2 as pb
from services.gateway.app import Gateway, make_app
from services.gateway.backend import Backend
from services.gateway.fetch import Fetcher
from services.gateway.pages import Playground
from services.gateway.process import bind
from services.gateway.settings import Settings

MODEL = "scripted"
KEY = "hiprune_canarykey"


def scores(values: list[float]) -> pruner_service_pb2.SelectionScores:
    """Object scores of one view."""
    data = struct.pack(f"<{len(values)}f", *values)
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[len(values)], data=data)
    return pruner_service_pb2.SelectionScores(object=tensor)


def took(stage: str, microseconds: int) -> encoder_service_pb2.StageTiming:
    """The time of a stage."""
    timing = encoder_service_pb2.StageTiming(stage=stage)
    timing.duration.FromMicroseconds(microseconds)
    return timing


def report(*kept: int, before: int = 196, scored: bool = False) -> pb.PruningReport:
    """A report on as many images, each with so many tokens kept."""
    return pb.PruningReport(
        media=[
            pb.MediaReport(
                summary=pruner_service_pb2.PruneSummary(
                    policy=pruner_service_pb2.PrunePolicy(
                        method=pruner_service_pb2.METHOD_HIPRUNE, keep_count=count
                    ),
                    tokens_before=before,
                    tokens_requested=count,
                    tokens_kept=count,
                ),
                cache=pruner_service_pb2.CACHE_STATUS_MISS,
                views=[
                    pruner_service_pb2.Selection(
                        kept_indices=range(count),
                        kinds=[pruner_service_pb2.TOKEN_KIND_ANCHOR] * count,
                        grid_height=14,
                        grid_width=14,
                        scores=scores([index / 4 for index in range(196)]) if scored else None,
                    )
                ],
                timings=[took("select", 1500)],
            )
            for count in kept
        ]
    )


def completion(tokens: int, reason: int = pb.FINISH_REASON_STOP) -> pb.Completion:
    """The end of an answer of so many tokens."""
    usage = pb.Usage(
        prompt_tokens=80,
        completion_tokens=tokens,
        visual_tokens_before=196,
        visual_tokens_after=65,
        prompt_tokens_cached=7,
        prefill_flops_before=9e6,
        prefill_flops_after=3e6,
    )
    return pb.Completion(finish_reason=reason, usage=usage, timings=[took("prefill", 12_250)])


@dataclass
class Asked:
    """One AskImage as the llm got it."""

    request: pb.AskImageRequest
    metadata: dict[str, str]
    seconds: float | None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedLlm(
    llm_service_pb2_grpc.ImageQaServiceServicer,
    llm_service_pb2_grpc.LanguageModelServiceServicer,
    health_pb2_grpc.HealthServicer,
):
    """Answers with `words`, one delta each; or fails with `error`, after so many of them."""

    def __init__(self) -> None:
        self.address = ""
        self.reset()

    def reset(self) -> None:
        """As new."""
        self.words: list[str] = ["a ", "red ", "circle"]
        self.media = 1
        self.error: HipruneError | None = None
        self.error_after: int | None = None
        self.completes = True
        self.key = ""
        self.serving = True
        self.pace: Callable[[int], Awaitable[None]] | None = None
        self.asked: list[Asked] = []
        self.was_asked = asyncio.Event()
        self.described = 0

    async def AskImage(self, request: pb.AskImageRequest, context: Any) -> Any:
        metadata = dict(context.invocation_metadata())
        asked = Asked(request, metadata, context.time_remaining())
        self.asked.append(asked)
        self.was_asked.set()
        try:
            await self._check(metadata, context)
            if self.error is not None and self.error_after is None:
                await context.abort_with_status(rpc_status.to_status(to_status(self.error)))
            scored = request.policy.include_scores
            yield pb.AskImageResponse(report=report(*[65] * self.media, scored=scored))
            for place, word in enumerate(self.words):
                if self.error is not None and place == self.error_after:
                    await context.abort_with_status(rpc_status.to_status(to_status(self.error)))
                if self.pace is not None:
                    await self.pace(place)
                yield pb.AskImageResponse(delta=pb.TextDelta(text=word))
            if self.completes:
                yield pb.AskImageResponse(completion=completion(len(self.words)))
        finally:
            asked.ended.set()

    async def GetLanguageModel(self, request: Any, context: Any) -> pb.GetLanguageModelResponse:
        self.described += 1
        await self._check(dict(context.invocation_metadata()), context)
        return pb.GetLanguageModelResponse(model=MODEL, engine="scripted", context_length=512)

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if self.serving else status.NOT_SERVING)

    async def Watch(self, request: Any, context: Any) -> Any:
        yield await self.Check(request, context)
        await asyncio.Event().wait()

    async def _check(self, metadata: dict[str, str], context: Any) -> None:
        if self.key and metadata.get("authorization") != f"Bearer {self.key}":
            await context.abort_with_status(rpc_status.to_status(to_status(Unauthenticated("no API key"))))


@asynccontextmanager
async def scripted_llm() -> AsyncIterator[ScriptedLlm]:
    """A scripted llm on a free port."""
    llm = ScriptedLlm()
    server = grpc.aio.server()
    llm_service_pb2_grpc.add_ImageQaServiceServicer_to_server(llm, server)
    llm_service_pb2_grpc.add_LanguageModelServiceServicer_to_server(llm, server)
    health_pb2_grpc.add_HealthServicer_to_server(llm, server)
    llm.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield llm
    finally:
        await server.stop(None)


@asynccontextmanager
async def gateway(llm: str, *, fetcher: Fetcher | None = None, **settings: Any) -> AsyncIterator[str]:
    """The URL of a gateway before an llm."""
    read = Settings(llm=llm, **settings)
    backend, fetcher = Backend(read), fetcher or Fetcher(read.hosts)
    listening = bind("127.0.0.1:0")
    config = uvicorn.Config(
        make_app(Gateway(read, backend, fetcher), Playground(read)),
        lifespan="off",
        loop="none",
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        await fetcher.close()
        await backend.close()


class _Server(uvicorn.Server):
    def capture_signals(self) -> Any:
        return nullcontext()  # signals are the tests' own
