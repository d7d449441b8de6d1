"""What the tests of the engine vllm share: a model in it, jobs and answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch

from services.llm.engines.base import Job
from services.llm.families import SplicedPrompt
from services.llm.pipeline import LanguageModel
from services.llm.process import load
from services.llm.sampling import Sampling
from services.llm.settings import Settings

CONTEXT: Final = 1024
BLOCK: Final = 128
"""Tokens of a block of keys and values on a CPU."""
ENVIRON: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}
"""For models this small one thread is enough; unbound, several processes of vLLM's fit on one NUMA node."""


async def started(path: Path, *arguments: str, vllm: str = "--enforce-eager") -> LanguageModel:
    """The model in vLLM, started with these arguments of the service's and of vLLM's; the caller stops it."""
    os.environ |= ENVIRON
    given = ["--model", str(path), "--engine", "vllm", "--max-concurrency", "16", *arguments]
    model = load(Settings.read([*given, f"--vllm-args={vllm} --max-num-batched-tokens=2048"], {}))
    await model.engine.start()
    return model


def job(model: LanguageModel, length: int, max_tokens: int, seed: int = 0, **fields) -> Job:
    """A prompt of random words, at positions that count on."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 110, (length,), generator=draw).tolist()
    prompt = SplicedPrompt(model.engine.embed(ids), torch.arange(length), visual_tokens=0)
    return Job(prompt, ids, Sampling(), max_tokens, **fields)


async def answer(model: LanguageModel, wanted: Job) -> list[int]:
    """Its tokens."""
    return [step.token async for step in model.engine.generate(wanted)]
