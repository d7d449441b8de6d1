"""LoRA adapters in vLLM: each answers as its merged model does, and none answers for another in one batch."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hiprune.checkpoints import CheckpointError
from hiprune.config import ConfigError
from services.llm.engines.adapters import LoraAdapter, read_adapters
from services.llm.engines.base import Job
from services.llm.engines.vllm import read_arguments
from services.llm.pipeline import LanguageModel
from services.llm.process import load
from services.llm.settings import Settings
from tests.tiny_lora import make_lora, merge
from tests.vllm.engines import BLOCK, answer, job, started

pytestmark = [pytest.mark.extra, pytest.mark.vllm]

ANSWER_TOKENS = 12


@pytest.fixture(scope="module")
def adapters(llava, tmp_path_factory) -> dict[str, str]:
    """Directories by name: one that changes every layer's products, one that changes two of them alone."""
    folder = tmp_path_factory.mktemp("adapters")
    every = make_lora(folder / "every", llava, 1, prefix="model.language_model.")
    some = make_lora(
        folder / "some", llava, 2, rank=2, modules=("q_proj", "v_proj"), prefix="language_model.model."
    )
    return {"every": str(every), "some": str(some)}


@pytest.fixture(scope="module")
async def model(llava, adapters) -> AsyncIterator[LanguageModel]:
    listed = ",".join(f"{name}={path}" for name, path in adapters.items())
    running = await started(llava, f"--lora-adapters={listed}")
    yield running
    await running.engine.stop()


async def merged(llava, adapter: str) -> LanguageModel:
    """transformers, with the adapter added to its weights."""
    plain = load(Settings.read(["--model", str(llava)], {}))
    await plain.engine.start()
    if adapter:
        merge(plain.engine._model, Path(adapter))
    return plain


async def test_each_adapter_answers_as_its_merged_model_alone_and_beside_the_others(llava, model, adapters):
    jobs: list[Job] = []
    expected: list[list[int]] = []
    for adapter in ("", *adapters):
        plain = await merged(llava, adapters.get(adapter, ""))
        for number in range(5):
            wanted = job(model, 5 + 23 * number, ANSWER_TOKENS, seed=number, adapter=adapter)
            jobs.append(wanted)
            expected.append(await answer(plain, wanted))
        await plain.engine.stop()
    assert len({tuple(each) for each in expected}) == len(jobs)
    assert [await answer(model, each) for each in jobs] == expected
    # one behind the other, so that neighbours in a batch differ
    mixed = [number * 5 + place for place in range(5) for number in range(3)]
    found = await asyncio.gather(*(answer(model, jobs[place]) for place in mixed))
    assert found == [expected[place] for place in mixed]


async def test_what_an_adapter_has_read_of_a_prompt_serves_no_other(model):
    wanted = job(model, 2 * BLOCK + 9, 2, seed=70)

    async def cached(adapter: str) -> int:
        return [step async for step in model.engine.generate(dataclasses.replace(wanted, adapter=adapter))][
            -1
        ].cached

    assert [await cached(name) for name in ("", "every", "some", "every", "")] == [
        0,
        0,
        0,
        2 * BLOCK,
        2 * BLOCK,
    ]


def test_vllm_is_told_of_adapters_by_the_service_alone(llava, adapters):
    found = read_adapters(f"a={adapters['every']}", "model")
    arguments = read_arguments("--fully-sharded-loras", llava, found)
    assert (arguments.enable_lora, arguments.max_lora_rank, arguments.fully_sharded_loras) == (True, 8, True)
    assert not read_arguments("", llava).enable_lora
    for text in ("--enable-lora", "--max-loras=1", "--lora-modules a=b"):
        with pytest.raises(ConfigError, match="decided by the service's own settings"):
            read_arguments(text, llava, found)
    with pytest.raises(CheckpointError, match="a rank of 1000"):
        read_arguments("", llava, [LoraAdapter("a", llava, 1000)])
