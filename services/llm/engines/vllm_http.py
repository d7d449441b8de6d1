"""A vLLM server that runs elsewhere, with the language model of `hiprune export-lm`, over its OpenAI API.

Embeddings go there base64 in JSON, which costs more than a process beside this one does. The server must be
started with `--enable-prompt-embeds`, and be reachable by this service alone: whoever can send it embeddings
can end it. Positions are the server's own, 0, 1, 2, so families whose positions have gaps are refused.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import httpx2
import torch

from hiprune import deadlines
from hiprune.config import ConfigError
from hiprune.errors import Internal, Unavailable
from hiprune.language_part import has_mrope
from services.llm.engines.base import POSITIONS_END, Job, Step
from services.llm.engines.defaults import (
    end_tokens,
    read_generation_config,
    refuse_beyond,
    seed_for_vllm,
)
from services.llm.engines.embeddings import EmbeddingTable
from services.llm.engines.stages import AnswerStages
from services.llm.families import LanguagePart
from services.llm.placement import Placement

log = logging.getLogger("hiprune.llm")

_CONNECT_S: Final = 5.0
_MOST_S: Final = 600.0
_RETRY_S: Final = 1.0
_JSON: Final = {"Content-Type": "application/json"}
_LATER: Final = (httpx2.codes.REQUEST_TIMEOUT, httpx2.codes.TOO_MANY_REQUESTS)
"""Refusals that say nothing about the request: of a proxy in between, say."""


class VllmHttpEngine:
    """The language model behind a URL."""

    name = "vllm-http"

    def __init__(
        self,
        path: Path,
        language: LanguagePart,
        placement: Placement,
        max_concurrency: int,
        url: str,
        key: str = "",
    ) -> None:
        """`key` is the server's `--api-key`. Raises ConfigError, CheckpointError."""
        config = language.config.get_text_config()
        if has_mrope(config):
            raise ConfigError(
                f"engine (--engine): got 'vllm-http', and positions of {config.model_type} have three axes, "
                "which that server does not take: use vllm or transformers"
            )
        if not url:
            raise ConfigError("url (--url): is empty, and the engine vllm-http needs its server's")
        self._placement = placement
        self._table = EmbeddingTable(path, placement)
        defaults = read_generation_config(path, config)
        refuse_beyond(defaults, path, self.name, repetition_penalty=1.0)
        self.end_tokens = end_tokens(defaults)
        self.context_length = int(config.max_position_embeddings)
        self.positions_end = POSITIONS_END
        self._model = ""
        self._client = httpx2.AsyncClient(
            base_url=url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(_MOST_S, connect=_CONNECT_S),
            limits=httpx2.Limits(max_connections=max_concurrency + 2),
            follow_redirects=False,
            trust_env=False,
        )

    async def start(self) -> None:
        """Asks the server which model it has. Raises ConfigError when it does not answer as one of vLLM's."""
        try:
            answer = await self._client.get("v1/models")
            answer.raise_for_status()
            (model, *_) = answer.json()["data"]
            self._model, self.context_length = str(model["id"]), int(model["max_model_len"])
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"url (--url): no vLLM server with one model answers at {self._client.base_url}: "
                f"{type(error).__name__}"
            ) from error
        log.info(
            "language model %r at %s, context %d", self._model, self._client.base_url, self.context_length
        )

    async def stop(self) -> None:
        """Hangs up, which ends what the server still generates for us."""
        await self._client.aclose()

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Input embeddings, (T, H)."""
        return self._table.rows(token_ids)

    async def generate(self, job: Job) -> AsyncGenerator[Step, None]:
        """See `Engine.generate`. Raises Unavailable when the server cannot be reached or fails, Internal."""
        rows = job.prompt.embeddings
        if rows.ndim != 2 or rows.shape[1] != self._table.width or not 1 <= len(rows) < self.context_length:
            raise Internal(
                f"a prompt of shape {tuple(rows.shape)}, expected (S, {self._table.width}) with S in "
                f"[1, {self.context_length - 1}]"
            )
        request = await asyncio.to_thread(self._request, job)
        with AnswerStages() as stages:
            async with aclosing(self._stream(request)) as steps:
                async for tokens, cached in steps:
                    for token in tokens:
                        stages.token()
                        yield Step(token, cached)

    def _request(self, job: Job) -> bytes:
        """The request's body. Blocks: a long prompt is hundreds of megabytes of JSON."""
        buffer = io.BytesIO()
        torch.save(job.prompt.embeddings.detach().cpu().clone(), buffer)  # what the server takes
        request: dict[str, Any] = {
            "model": self._model,
            "prompt_embeds": base64.b64encode(buffer.getvalue()).decode("ascii"),
            "max_tokens": job.max_tokens,
            "temperature": job.sampling.temperature,
            "top_p": job.sampling.top_p,
            **({"seed": seed_for_vllm(job.sampling.seed)} if job.sampling.seed is not None else {}),
            "stop_token_ids": sorted(self.end_tokens),
            "cache_salt": hashlib.sha256(job.owner.encode()).hexdigest(),
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "return_token_ids": True,
        }
        return json.dumps(request).encode("ascii")

    async def _stream(self, request: bytes) -> AsyncGenerator[tuple[list[int], int], None]:
        """Tokens as they come, and how many of the prompt's the server had. Raises Unavailable, Internal."""
        last: list[int] = []
        limit = httpx2.Timeout(deadlines.for_next_hop(_MOST_S), connect=_CONNECT_S)
        try:
            async with self._client.stream(
                "POST", "v1/completions", content=request, headers=_JSON, timeout=limit
            ) as answer:
                _accept(answer)
                async for line in answer.aiter_lines():
                    event = line.removeprefix("data: ")
                    if not line.startswith("data: ") or event == "[DONE]":
                        continue
                    content = json.loads(event)
                    if "error" in content:
                        raise Unavailable("the language model's server failed", retry_after_s=_RETRY_S)
                    details = (content.get("usage") or {}).get("prompt_tokens_details") or {}
                    cached = int(details.get("cached_tokens") or 0)
                    for choice in content.get("choices", ()):
                        tokens = [int(token) for token in choice.get("token_ids") or ()]
                        if choice.get("finish_reason"):
                            last = tokens  # what was cached is told behind it
                        else:
                            yield tokens, cached
                    if last and not content.get("choices"):
                        yield last, cached
                        last = []
                if last:
                    yield last, 0
        except httpx2.HTTPError as error:
            raise Unavailable(
                f"the language model's server cannot be reached: {type(error).__name__}",
                retry_after_s=_RETRY_S,
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise Internal("the language model's server answered with something else") from error


def _accept(answer: httpx2.Response) -> None:
    """Raises Unavailable, Internal for what is no answer; without its words, which may name paths."""
    if answer.status_code >= httpx2.codes.INTERNAL_SERVER_ERROR or answer.status_code in _LATER:
        raise Unavailable(f"the language model's server answers {answer.status_code}", retry_after_s=_RETRY_S)
    if answer.is_error or answer.is_redirect:
        raise Internal(f"the language model's server answers {answer.status_code}")
