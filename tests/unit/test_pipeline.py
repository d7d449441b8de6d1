"""From tokens to an answer: what is refused before an engine sees it, and what is no answer."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator

import pytest
import torch

from hiprune import devices, telemetry
from hiprune.errors import InvalidInput, Unavailable
from hiprune.v1 import llm_service_pb2
from services.llm.engines.base import Job, Step
from services.llm.pipeline import LanguageModel
from services.llm.process import LlmService, load
from services.llm.settings import Settings


class Leaving:
    """An engine that stops after some tokens, as one does whose process is told to end."""

    def __init__(self, engine, tokens: int) -> None:
        self._engine, self._tokens = engine, tokens

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    async def generate(self, job: Job) -> AsyncGenerator[Step, None]:
        for token in [17] * min(self._tokens, job.max_tokens):
            yield Step(token)


@pytest.fixture(scope="module")
async def model():
    loaded = load(Settings.read([], {}))
    await loaded.engine.start()
    yield loaded
    await loaded.engine.stop()


async def events(model: LanguageModel, max_tokens: int = 4) -> list:
    message = llm_service_pb2.Message(role=llm_service_pb2.ROLE_USER)
    message.parts.add(text="hello")
    sampling = llm_service_pb2.Sampling(max_tokens=max_tokens)
    request = model.read([message], sampling, "", media="media")
    return [event async for event in model.answer(request, [], telemetry.StageClock())]


async def test_an_answer_that_breaks_off_is_an_error_and_not_a_short_answer(model):
    whole = await events(dataclasses.replace(model, engine=Leaving(model.engine, 9)))
    assert whole[-1].finish_reason == llm_service_pb2.FINISH_REASON_LENGTH
    for tokens in (0, 3):
        with pytest.raises(Unavailable, match="in the middle of the answer"):
            await events(dataclasses.replace(model, engine=Leaving(model.engine, tokens)))


async def test_a_gpu_that_is_lost_is_noticed_wherever_it_was_at_work(model, monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Broken(Leaving):
        async def generate(self, job):
            raise RuntimeError("in the language model")
            yield

        def embed(self, token_ids):
            if self._tokens == 0:
                raise RuntimeError("in the embeddings")
            return self._engine.embed(token_ids)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    service = LlmService(Settings.read([], {}))
    for tokens, where in ((9, "language model"), (0, "embeddings")):
        watch = devices.Watch(torch.device("cuda"))
        service._model = dataclasses.replace(model, engine=Broken(model.engine, tokens), watch=watch)
        with pytest.raises(RuntimeError, match=where):
            await events(service._model)
        assert "cuda takes no more work" in await asyncio.wait_for(service.failed(), 5)


async def test_positions_beyond_what_an_engine_takes_are_refused_with_the_bound(model):
    narrow = Leaving(model.engine, 9)
    narrow.positions_end = 10
    assert await events(dataclasses.replace(model, engine=narrow), max_tokens=2)
    with pytest.raises(InvalidInput, match=r"expected at most 9 for both") as caught:
        await events(dataclasses.replace(model, engine=narrow), max_tokens=8)
    assert caught.value.reason == "LIMIT_EXCEEDED"
