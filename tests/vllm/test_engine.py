"""vLLM as an engine: many at once, leaving early, an engine that dies, prompts that begin alike."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from hiprune.config import ConfigError
from hiprune.errors import Internal, Unavailable
from services.llm.engines.base import Job
from services.llm.engines.vllm import read_arguments
from services.llm.families import SplicedPrompt
from services.llm.pipeline import LanguageModel
from tests.vllm.engines import BLOCK, answer, job, started

pytestmark = [pytest.mark.extra, pytest.mark.vllm]


@pytest.fixture(scope="module")
async def model(llava):
    running = await started(llava)
    yield running
    await running.engine.stop()


async def test_sixteen_at_once_are_answered_as_one_at_a_time(model):
    wanted = [job(model, 3 + 31 * number, 10 + number, seed=number) for number in range(16)]
    alone = [await answer(model, each) for each in wanted]
    assert [len(each) for each in alone] == [10 + number for number in range(16)]
    assert len({tuple(each[:10]) for each in alone}) == 16
    assert await asyncio.gather(*(answer(model, each) for each in wanted)) == alone


async def held(model: LanguageModel, at_least: float) -> None:
    async with asyncio.timeout(30):
        while model.engine.blocks_held < at_least:  # noqa: ASYNC110  # told by another process
            await asyncio.sleep(0.005)


async def test_a_cancelled_answer_gives_its_blocks_back_while_others_go_on(model):
    async def read(wanted: Job) -> None:
        async with aclosing(model.engine.generate(wanted)) as steps:
            async for _ in steps:
                pass

    # keeps vLLM stepping, so that it goes on telling what is held
    companion = asyncio.create_task(read(job(model, 5, 1000, seed=100)))
    await held(model, 1e-9)
    alone = model.engine.blocks_held
    long = asyncio.create_task(read(job(model, 900, 100, seed=101)))
    await held(model, 5 * alone)
    long.cancel()
    async with asyncio.timeout(10):
        while model.engine.blocks_held > 2 * alone:  # noqa: ASYNC110  # told by another process
            await asyncio.sleep(0.002)
    assert not companion.done()
    companion.cancel()
    await asyncio.gather(long, companion, return_exceptions=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda prompt: dataclasses.replace(prompt, embeddings=prompt.embeddings[:, :7]),
        lambda prompt: dataclasses.replace(prompt, embeddings=prompt.embeddings.bfloat16()),
        lambda prompt: dataclasses.replace(prompt, embeddings=prompt.embeddings[:0]),
        lambda prompt: dataclasses.replace(prompt, positions=prompt.positions[:3]),
        lambda prompt: dataclasses.replace(prompt, embeddings=prompt.embeddings.repeat(300, 1)),
    ],
    ids=["width", "dtype", "nothing", "positions", "longer than the context"],
)
async def test_a_prompt_that_would_end_vllm_never_reaches_it(model, spoil):
    good = job(model, 10, 3)
    with pytest.raises(Internal, match="expected"):
        await answer(model, dataclasses.replace(good, prompt=spoil(good.prompt)))
    assert len(await answer(model, good)) == 3


async def test_a_prompt_that_begins_like_an_earlier_one_of_the_same_owner_is_read_from_there(model):
    first = job(model, 3 * BLOCK + 40, 2, seed=7, owner="one")
    longer = dataclasses.replace(
        first,
        prompt=SplicedPrompt(
            torch.cat((first.prompt.embeddings, first.prompt.embeddings[:9])),
            torch.arange(3 * BLOCK + 49),
            visual_tokens=0,
        ),
    )

    async def cached(wanted: Job) -> int:
        steps = [step async for step in model.engine.generate(wanted)]
        return steps[-1].cached

    assert [await cached(first), await cached(longer)] == [0, 3 * BLOCK]
    assert await cached(dataclasses.replace(longer, owner="other")) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--dtype=half", "decided by the service's own settings"),
        ("--no-such-thing=1", "vLLM has no argument"),
        ("--max-model-len=many", "vllm_args"),
        ("'", "no list of words"),
    ],
)
def test_arguments_that_vllm_does_not_take_are_refused_by_name(llava, text, said):
    with pytest.raises(ConfigError, match=said):
        read_arguments(text, llava)


async def test_an_engine_that_is_killed_ends_its_answers_as_unavailable_and_says_so(llava):
    model = await started(llava)
    running = asyncio.create_task(answer(model, job(model, 5, 900)))
    failed = asyncio.create_task(model.engine.failed())
    await held(model, 1e-9)
    os.kill(max(children()), signal.SIGKILL)
    async with asyncio.timeout(30):
        with pytest.raises(Unavailable, match="engine has ended"):
            await running
        assert "ended" in await failed
    with pytest.raises(Unavailable):
        await answer(model, job(model, 5, 3))
    await model.engine.stop()


def children() -> list[int]:
    """vLLM's engines below this process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text("utf-8").partition(" (")[2].rpartition(") ")
            if name.startswith("VLLM::Engine") and int(rest.split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found
