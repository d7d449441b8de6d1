"""vLLM beside transformers: the same greedy answers for every family, through three real services each.

These run in an environment of their own, `.venv-vllm`; see the Makefile.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from hiprune.client import Client, video
from hiprune.config import EMBEDDED_MODEL
from hiprune.stack import Stack
from hiprune.v1 import llm_service_pb2, media_pb2, pruner_service_pb2
from tests.stacks import picture, questions
from tests.tiny import make_llava
from tests.tiny_anyres import make_llava_next, make_llava_onevision
from tests.tiny_qwen import make_qwen2_5_vl
from tests.tiny_video_llava import make_video_llava

pytestmark = [pytest.mark.extra, pytest.mark.vllm]

INPUTS = 20
ANSWER_TOKENS = 16
SIZES = [(64, 64), (200, 90), (31, 77), (120, 160), (90, 90)]
ENGINE = {
    "HIPRUNE_LLM_ENGINE": "vllm",
    "HIPRUNE_LLM_VLLM_ARGS": "--enforce-eager",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "embedded": lambda path: EMBEDDED_MODEL,
    "llava": make_llava,
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
    "video_llava": make_video_llava,
    "qwen2_5_vl": make_qwen2_5_vl,
}
WITH_VIDEO = {"video_llava", "qwen2_5_vl"}


def resized(data: bytes, size: tuple[int, int]) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        file = io.BytesIO()
        image.convert("RGB").resize(size).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory) -> Iterator[tuple[str, Stack, Stack]]:
    """The family's name, its services with transformers, and with vLLM."""
    path = FAMILIES[request.param](tmp_path_factory.mktemp("model"))
    with (
        Stack(model=str(path), redis=False) as plain,
        Stack(model=str(path), redis=False, environ=ENGINE) as vllm,
    ):
        yield request.param, plain, vllm


def inputs(family: str) -> list[tuple[str, bytes | media_pb2.Media]]:
    """Questions, each on a picture of another size or, where the family takes them, on a video."""
    found: list[tuple[str, bytes | media_pb2.Media]] = []
    for number, sample in enumerate(questions()[:INPUTS]):
        data = resized(picture(sample["image"]), SIZES[number % len(SIZES)])
        if family in WITH_VIDEO and number % 4 == 3:
            frames = [resized(picture(f"scene{index:02d}.png"), (64, 48)) for index in range(8)]
            found.append((sample["question"], video(frames, 1 + number)))
        else:
            found.append((sample["question"], data))
    assert len(found) == INPUTS
    return found


@pytest.mark.parametrize("keep", [1.0, 0.33])
async def test_greedy_answers_are_those_of_transformers(pair, keep):
    family, plain, vllm = pair
    policy = pruner_service_pb2.PrunePolicy(method=pruner_service_pb2.METHOD_HIPRUNE, keep_ratio=keep)
    sampling = llm_service_pb2.Sampling(max_tokens=ANSWER_TOKENS)
    lengths = set()
    async with Client(plain.address) as one, Client(vllm.address) as other:
        for question, media in inputs(family):
            expected = await one.ask(question, media, policy=policy, sampling=sampling)
            found = await other.ask(question, media, policy=policy, sampling=sampling)
            assert list(found.completion.token_ids) == list(expected.completion.token_ids)
            assert found.text == expected.text
            assert found.completion.finish_reason == expected.completion.finish_reason
            assert found.completion.usage.prompt_tokens == expected.completion.usage.prompt_tokens
            lengths.add(len(found.completion.token_ids))
    assert max(lengths) > 1
