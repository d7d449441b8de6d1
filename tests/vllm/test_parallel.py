"""A model over two of vLLM's processes, each layer shared or layers dealt out: the same greedy answers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest
import torch

from hiprune.config import ConfigError
from services.llm.engines.base import Job
from services.llm.engines.vllm import read_arguments
from services.llm.families import SplicedPrompt
from services.llm.process import load
from services.llm.settings import Settings
from tests.tiny_qwen import make_qwen2_5_vl
from tests.vllm.engines import answer, job, started

pytestmark = [pytest.mark.extra, pytest.mark.vllm]

ANSWER_TOKENS = 16


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
async def plain(request, tmp_path_factory) -> AsyncIterator[tuple[str, list[Job], list[list[int]]]]:
    """A checkpoint's directory; jobs, and what transformers answers in this process."""
    if request.param == "llava":
        path = request.getfixturevalue("llava")
    else:
        path = make_qwen2_5_vl(tmp_path_factory.mktemp("qwen"))
    model = load(Settings.read(["--model", str(path)], {}))
    await model.engine.start()
    jobs = [job(model, 5 + 31 * number, ANSWER_TOKENS, seed=number) for number in range(6)]
    if request.param == "qwen2_5_vl":
        jobs = [with_grid(each) for each in jobs]
    expected = [await answer(model, each) for each in jobs]
    assert len({tuple(each) for each in expected}) == len(jobs)
    yield str(path), jobs, expected
    await model.engine.stop()


def with_grid(wanted: Job) -> Job:
    """The same rows at places that prompts of pruned images have: time, row and column, with gaps."""
    length = len(wanted.prompt.embeddings)
    inside = torch.arange(length - 4)
    grid = torch.stack((torch.full_like(inside, 2), 2 + inside // 3, 2 + 2 * (inside % 3)))
    ends = torch.arange(2).expand(3, 2)
    positions = torch.cat((ends, grid, int(grid.max()) + 1 + ends), dim=1)  # (3, S)
    return dataclasses.replace(
        wanted, prompt=SplicedPrompt(wanted.prompt.embeddings, positions, length - 4, media_end=length - 2)
    )


TRACED = """--compilation-config='{"mode": 2, "backend": "eager"}'"""
"""With vLLM's warm-up, which groups of layers need on a CPU, and without a compiler."""


@pytest.mark.parametrize(
    ("flag", "vllm"),
    [("--tensor-parallel-size=2", "--enforce-eager"), ("--pipeline-parallel-size=2", TRACED)],
    ids=["tensor", "pipeline"],
)
async def test_two_processes_answer_as_one_does(plain, flag, vllm):
    path, jobs, expected = plain
    spread = await started(path, flag, vllm=vllm)
    try:
        assert await asyncio.gather(*(answer(spread, each) for each in jobs)) == expected
    finally:
        await spread.engine.stop()


def test_groups_of_layers_without_a_warm_up_are_refused_on_a_cpu(llava):
    assert read_arguments("--pipeline-parallel-size=2", llava).pipeline_parallel_size == 2
    with pytest.raises(ConfigError, match="warm-up"):
        read_arguments("--pipeline-parallel-size=2 --enforce-eager", llava)
