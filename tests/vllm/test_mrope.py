"""Positions on three axes in vLLM: what they are part of, and how far they go."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import pytest
import torch

from hiprune.errors import Internal
from services.llm.engines.base import Job
from services.llm.pipeline import LanguageModel
from services.llm.process import load
from services.llm.settings import Settings
from tests.tiny_qwen import make_qwen2_5_vl
from tests.vllm.engines import BLOCK, answer, job, started

pytestmark = [pytest.mark.extra, pytest.mark.vllm]


@pytest.fixture(scope="module")
async def models(tmp_path_factory) -> AsyncIterator[tuple[LanguageModel, LanguageModel]]:
    """One checkpoint in vLLM, and in transformers."""
    path = make_qwen2_5_vl(tmp_path_factory.mktemp("qwen"))
    running, plain = await started(path), load(Settings.read(["--model", str(path)], {}))
    await plain.engine.start()
    yield running, plain
    for each in (running, plain):
        await each.engine.stop()


def at(wanted: Job, positions: torch.Tensor) -> Job:
    """The same rows elsewhere: `positions` (S), on each axis."""
    prompt = dataclasses.replace(
        wanted.prompt, positions=positions.expand(3, -1), media_end=len(positions) - 1
    )
    return dataclasses.replace(wanted, prompt=prompt)


async def test_the_same_tokens_at_other_places_are_read_anew(models):
    model, plain = models
    length = 2 * BLOCK + 30
    rows = job(plain, length, 8, seed=3, owner="one")
    near, far = at(rows, torch.arange(length)), at(rows, 2 * torch.arange(length))

    async def cached(wanted: Job) -> int:
        return [step async for step in model.engine.generate(wanted)][-1].cached

    assert await cached(near) == 0
    assert await cached(near) == 2 * BLOCK
    assert await cached(far) == 0
    expected = [await answer(plain, near), await answer(plain, far)]
    assert [await answer(model, near), await answer(model, far)] == expected
    assert expected[0] != expected[1]


async def test_a_position_that_vllm_has_no_sine_for_never_reaches_it(models):
    model, _ = models
    rows = job(model, 10, 5)
    last = model.engine.positions_end - 6
    with pytest.raises(Internal, match="expected 0 to"):
        await answer(model, at(rows, torch.arange(10) + last - 8))
    with pytest.raises(Internal, match="expected 0 to"):
        await answer(model, at(rows, torch.arange(10) - 1))
    assert len(await answer(model, at(rows, torch.arange(10) + last - 9))) == 5
