"""The language model as a whole: a checked request in, deltas and a completion out. Knows no gRPC context.

messages ─read─▶ Request ─┐
                          ├─answer─▶ project, splice ─▶ prefill, decode ─▶ deltas … completion
pruned media ─────────────┘
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Literal

import torch

from hiprune import auth, telemetry
from hiprune.checkpoints import Checkpoint
from hiprune.costs import TextShape, prefill_flops
from hiprune.devices import Watch
from hiprune.errors import InvalidInput, NotFound, Unavailable
from hiprune.v1 import llm_service_pb2, pruner_service_pb2
from services.llm.chat import Chat
from services.llm.detokenize import Detokenizer
from services.llm.engines.base import Engine, Job
from services.llm.families import Adapter, SplicedPrompt
from services.llm.prompts import Limits, Prompt, read_prompt
from services.llm.sampling import Sampling, read_sampling
from services.llm.slots import Slots
from services.llm.visual import VisualTokens, read_pruned

Messages = Sequence[llm_service_pb2.Message]
_SHOWN_CHARS: Final = 200
"""Of a name that is none of ours: it may be as long as a request."""
Event = llm_service_pb2.TextDelta | llm_service_pb2.Completion


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for, checked."""

    prompt: Prompt
    sampling: Sampling
    adapter: str = ""
    """That answers; empty: the model as it is."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """Everything that is loaded, and who may use it now."""

    name: str
    checkpoint: Checkpoint
    chat: Chat
    adapter: Adapter
    engine: Engine
    shape: TextShape
    limits: Limits
    max_new_tokens: int
    slots: Slots
    watch: Watch
    adapters: Sequence[str] = ()
    """Names of LoRA adapters that may answer in the model's place."""

    def read(
        self,
        messages: Messages,
        sampling: llm_service_pb2.Sampling,
        model: str,
        *,
        media: Literal["media", "pruned_media"],
    ) -> Request:
        """A request, checked in full but for its pixels and features. Blocks for as long as tokenizing takes.

        Raises NotFound, InvalidInput, Unsupported.
        """
        if model not in {"", self.name, *self.adapters}:
            served = ", ".join(repr(each) for each in (self.name, *self.adapters))
            raise NotFound(f"is {model[:_SHOWN_CHARS]!r}, this service has {served}", field="model")
        drawn = read_sampling(sampling, max_new_tokens=self.max_new_tokens)
        prompt = read_prompt(messages, self.chat, self.limits, media=media)
        # an image leaves at least one token, so a text that is too long by itself needs no encoder to say so
        self._check_length(len(prompt.token_ids))
        return Request(prompt, drawn, model if model in self.adapters else "")

    def read_pruned(self, media: pruner_service_pb2.PrunedMedia, field: str) -> VisualTokens:
        """Kept tokens for this model. Raises Mismatch, InvalidInput."""
        tokens = read_pruned(media, self.checkpoint.facts, self.checkpoint.vision_digest, field=field)
        self.adapter.check(tokens)
        return tokens

    async def answer(
        self, request: Request, media: Sequence[VisualTokens], clock: telemetry.StageClock
    ) -> AsyncGenerator[Event, None]:
        """Deltas as they come, then the completion, with the stages of `clock` in it.

        `media` are those of the prompt, in its order. The caller holds a slot.
        Raises InvalidInput, Unavailable.
        """
        with telemetry.stage("project"):
            async with self.watch.looking():
                prompt = await asyncio.to_thread(self._assemble, request.prompt, media)
        length = len(prompt.embeddings)
        self._check_length(length)
        room = self.engine.context_length - length
        budget = request.sampling.tokens_within(room, self.max_new_tokens)
        self._check_positions(prompt.positions, budget)
        text = Detokenizer(self.chat.backend, request.sampling.stop)
        generated: list[int] = []
        ended = False
        cached = 0
        job = Job(
            prompt,
            request.prompt.token_ids,
            request.sampling,
            budget,
            owner=auth.current().tenant.name,
            adapter=request.adapter,
        )
        async with self.watch.looking(), aclosing(self.engine.generate(job)) as steps:
            async for token, cached in steps:  # noqa: B007  # the last one counts
                if not generated:
                    telemetry.first_token()
                generated.append(token)
                ended = token in self.engine.end_tokens
                if not ended and (delta := text.push(token)):
                    yield llm_service_pb2.TextDelta(text=delta)
                if text.stopped:
                    break
        if not (ended or text.stopped) and len(generated) < budget:
            # half an answer is none: the engine was told to stop, or the server behind it was
            raise Unavailable("the language model left in the middle of the answer", retry_after_s=1)
        if rest := text.finish():
            yield llm_service_pb2.TextDelta(text=rest)
        before = length - prompt.visual_tokens + sum(each.tokens_before for each in media)
        flops = prefill_flops(self.shape, before), prefill_flops(self.shape, length)
        telemetry.count("hiprune.tokens.prompt", length)
        telemetry.count("hiprune.tokens.generated", len(generated))
        telemetry.count("hiprune.prefill.flops.before", flops[0])
        telemetry.count("hiprune.prefill.flops.after", flops[1])
        yield llm_service_pb2.Completion(
            finish_reason=llm_service_pb2.FINISH_REASON_STOP
            if ended or text.stopped
            else llm_service_pb2.FINISH_REASON_LENGTH,
            usage=llm_service_pb2.Usage(
                prompt_tokens=length,
                completion_tokens=len(generated),
                visual_tokens_before=sum(each.tokens_before for each in media),
                visual_tokens_after=prompt.visual_tokens,
                prefill_flops_before=flops[0],
                prefill_flops_after=flops[1],
                prompt_tokens_cached=cached,
            ),
            timings=clock.to_proto(),
            token_ids=generated,
        )

    def _assemble(self, prompt: Prompt, media: Sequence[VisualTokens]) -> SplicedPrompt:
        """The prompt as the language model sees it. Blocks."""
        rows = []
        for each in media:
            projected = self.adapter.project(each)  # (R, H)
            if not bool(torch.isfinite(projected).all()):
                raise InvalidInput(
                    f"do not stay finite in the model's {projected.dtype}: are they this tower's?",
                    field=f"{each.field}.views[0].features",
                )
            rows.append(projected)
        return self.adapter.splice(prompt.token_ids, self.engine.embed(prompt.token_ids), rows, media)

    def _check_length(self, tokens: int) -> None:
        """Refuses a prompt that leaves no room for one token of answer."""
        if tokens >= self.engine.context_length:
            raise InvalidInput(
                f"make a prompt of at least {tokens} tokens, expected at most "
                f"{self.engine.context_length - 1}: the model's context is {self.engine.context_length}",
                reason="LIMIT_EXCEEDED",
                field="messages",
            )

    def _check_positions(self, positions: torch.Tensor, budget: int) -> None:
        """Refuses positions (…, S) that the engine cannot take: a video says itself how long it lasts."""
        last = int(positions.max())
        if last + budget >= self.engine.positions_end:
            raise InvalidInput(
                f"reach position {last}, and {budget} tokens of answer go on from there, expected at most "
                f"{self.engine.positions_end - 1} for both: is a video's frames_per_second right?",
                reason="LIMIT_EXCEEDED",
                field="messages",
            )
