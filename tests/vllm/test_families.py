"""vLLM beside transformers: the same greedy answers for every family, through three real services each.

These run in an environment of their own, `.venv-vllm`; see the Makefile.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, MistralConfig, Qwen2_5_VLForConditionalGeneration

from hiprune.checkpoints import open_checkpoint
from hiprune.client import Client, video
from hiprune.config import EMBEDDED_MODEL
from hiprune.stack import Stack, free_port
from hiprune.v1 import llm_service_pb2, media_pb2, pruner_service_pb2
from services.encoder.families import load_tower
from tests.parity.test_qwen2_5_vl import LATE, NONE, THIRD, Stock, ask, kept_of
from tests.stacks import picture, questions
from tests.tiny import make_llava
from tests.tiny_anyres import make_llava_next, make_llava_onevision
from tests.tiny_qwen import make_qwen2_5_vl
from tests.tiny_video_llava import make_video_llava
from tests.vllm.engines import ENVIRON

pytestmark = [pytest.mark.extra, pytest.mark.vllm]

INPUTS = 20
ANSWER_TOKENS = 16
SIZES = [(64, 64), (200, 90), (31, 77), (120, 160), (90, 90)]
ENGINE = {
    "HIPRUNE_LLM_ENGINE": "vllm",
    "HIPRUNE_LLM_VLLM_ARGS": "--enforce-eager",
    **ENVIRON,
}
# with every kind of language model that their published checkpoints have
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "embedded": lambda path: EMBEDDED_MODEL,
    "llava": make_llava,
    "llava_next": partial(make_llava_next, text=MistralConfig, sliding_window=None),
    "llava_onevision": make_llava_onevision,
    "video_llava": make_video_llava,
    "qwen2_5_vl": partial(make_qwen2_5_vl, seed=4),
}
WITH_VIDEO = {"video_llava", "qwen2_5_vl"}


def resized(data: bytes, size: tuple[int, int]) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        file = io.BytesIO()
        image.convert("RGB").resize(size).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Pair:
    """A family's services, and a second language model beside the first, in vLLM."""

    family: str
    model: Path
    plain: str
    vllm: str


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory) -> Iterator[Pair]:
    model = FAMILIES[request.param](tmp_path_factory.mktemp("model"))
    with Stack(model=str(model), redis=False) as stack:
        address = f"127.0.0.1:{free_port()}"
        stack.set_environ(**ENGINE)
        stack.wait_ready(stack.start_replica("llm", address))
        yield Pair(request.param, model, stack.address, address)


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
    policy = pruner_service_pb2.PrunePolicy(method=pruner_service_pb2.METHOD_HIPRUNE, keep_ratio=keep)
    sampling = llm_service_pb2.Sampling(max_tokens=ANSWER_TOKENS)
    asked = inputs(pair.family)
    async with Client(pair.plain) as one, Client(pair.vllm) as other:
        expected, found = [
            await asyncio.gather(
                *(client.ask(question, media, policy=policy, sampling=sampling) for question, media in asked)
            )
            for client in (one, other)
        ]
    for left, right in zip(expected, found, strict=True):
        assert list(right.completion.token_ids) == list(left.completion.token_ids)
        assert right.text == left.text
        assert right.completion.finish_reason == left.completion.finish_reason
        assert right.completion.usage.prompt_tokens == left.completion.usage.prompt_tokens
    assert max(len(each.completion.token_ids) for each in found) > 1


@pytest.mark.parametrize("pair", ["qwen2_5_vl"], indirect=True)
async def test_decoding_of_long_video_goes_on_where_stock_generate_does(pair):
    """Slices so far apart in time that the last one lies beyond every position of the text behind it."""
    stock = Stock(
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(pair.model, dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(pair.model),
        image_processor=None,
        tower=load_tower(open_checkpoint(str(pair.model)), None, torch.device("cpu"), torch.float32),
    )
    inputs = stock.inputs(LATE)
    named = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    positions, _ = stock.model.model.get_rope_index(**{name: inputs[name] for name in named})
    assert positions[:, 0, -1].max() + 1 < positions.max() + 1
    everything = [list(range(int((inputs["mm_token_type_ids"] == 2).sum())))]
    async with Client(pair.vllm) as client:
        _, completion = await ask(client, LATE, NONE, ANSWER_TOKENS)
        report, of_some = await ask(client, LATE, THIRD, ANSWER_TOKENS)
    whole, pruned, kept = list(completion.token_ids), list(of_some.token_ids), kept_of(report)
    assert whole == stock.answer(LATE, ANSWER_TOKENS)
    assert len(kept[0]) < len(everything[0])
    for answer, seen in ((whole, everything), (pruned, kept)):
        assert answer == stock.masked_answer(LATE, seen, tokens=ANSWER_TOKENS)
        assert answer != stock.masked_answer(LATE, seen, tokens=ANSWER_TOKENS, go_on_at_max=True)
