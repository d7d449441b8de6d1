"""Random models through three real processes: keeping every token is the stock model, token for token."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hiprune.client import Client
from hiprune.stack import Stack
from hiprune.v1 import llm_service_pb2, pruner_service_pb2
from tests.stacks import picture, questions
from tests.tiny import LAYOUTS, make_llava

ANSWER_TOKENS = 12
SIZES = [(64, 64), (200, 90), (31, 77), (640, 480)]


def resized(data: bytes, size: tuple[int, int]) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        file = io.BytesIO()
        image.convert("RGB").resize(size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("seed", "layout"), list(enumerate(LAYOUTS)), ids=LAYOUTS)
async def test_a_random_model_in_each_key_layout_answers_as_stock(tmp_path_factory, seed, layout):
    path = make_llava(tmp_path_factory.mktemp("model"), seed, layout=layout)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    keep_all = pruner_service_pb2.PrunePolicy(method=pruner_service_pb2.METHOD_NONE)
    sampling = llm_service_pb2.Sampling(max_tokens=ANSWER_TOKENS)
    with Stack(model=str(path), redis=False) as stack:
        async with Client(stack.address) as client:
            for number, sample in enumerate(questions()[:8]):
                data = resized(picture(sample["image"]), SIZES[number % len(SIZES)])
                content = [{"type": "image"}, {"type": "text", "text": sample["question"]}]
                prompt = processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
                with Image.open(io.BytesIO(data)) as image:
                    inputs = processor(images=image, text=prompt, return_tensors="pt")
                output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
                stock = output[0, inputs["input_ids"].shape[1] :].tolist()
                answer = await client.ask(sample["question"], data, policy=keep_all, sampling=sampling)
                assert list(answer.completion.token_ids) == stock
