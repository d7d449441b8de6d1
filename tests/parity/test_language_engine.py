"""Claims about the language side: the stock model's tokens from the same features; draws; leaving early."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hiprune import telemetry
from hiprune.checkpoints import CheckpointError
from hiprune.config import EMBEDDED_MODEL
from hiprune.v1 import encoder_service_pb2
from hiprune.v1 import llm_service_pb2 as pb
from services.llm.engines.base import Job
from services.llm.engines.transformers import SeededSampler
from services.llm.families import SplicedPrompt
from services.llm.pipeline import LanguageModel, Request
from services.llm.process import load
from services.llm.sampling import Sampling
from services.llm.settings import Settings
from services.llm.visual import VisualTokens, VisualView
from tests.stacks import SAMPLES, questions
from tests.tiny import LAYOUTS, make_llava

GREEDY = Sampling()
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Stock:
    """The stock model and its processor: the reference for everything here."""

    model: Any
    processor: Any

    def inputs(self, turns, pictures) -> dict[str, torch.Tensor]:
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        return self.processor(images=pictures or None, text=text, return_tensors="pt")

    def answer(self, turns, pictures, max_new_tokens=ANSWER_TOKENS) -> list[int]:
        inputs = self.inputs(turns, pictures)
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    @torch.no_grad()
    def features(self, picture) -> torch.Tensor:
        """(N, D): the tower's own output, as the projector takes it."""
        pixels = self.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        hidden = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        return hidden[0, 1:]


@cache
def stock_of(path: Path) -> Stock:
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    return Stock(model, AutoProcessor.from_pretrained(path))


async def started(path: Path, **settings) -> LanguageModel:
    model = await asyncio.to_thread(load, Settings(model=str(path), **settings))
    await model.engine.start()
    return model


@pytest.fixture(scope="module")
async def embedded():
    model = await started(EMBEDDED_MODEL)
    yield model
    await model.engine.stop()


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory) -> Path:
    return make_llava(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture(scope="module")
async def tiny(tiny_path):
    model = await started(tiny_path)
    yield model
    await model.engine.stop()


def user(*parts: str) -> dict[str, Any]:
    """A user's turn for the stock processor: "" is a picture."""
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if part else {"type": "image"} for part in parts],
    }


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": words}]}


def messages_of(turns) -> list[pb.Message]:
    """The same turns on the wire, their pictures pruned already."""
    messages = []
    for turn in turns:
        message = pb.Message(role=pb.Role.Value(f"ROLE_{turn['role'].upper()}"))
        for content in turn["content"]:
            part = message.parts.add()
            if content["type"] == "text":
                part.text = content["text"]
            else:
                part.pruned_media.SetInParent()
        messages.append(message)
    return messages


def asked(model: LanguageModel, turns, sampling=GREEDY) -> Request:
    request = model.read(messages_of(turns), pb.Sampling(), "", media="pruned_media")
    return Request(request.prompt, sampling)


def visual(features: torch.Tensor) -> VisualTokens:
    """One view of a single row, all of it kept."""
    kept = torch.arange(len(features))
    view = VisualView(features, kept, (1, len(features)))
    return VisualTokens((view,), encoder_service_pb2.MediaLayout(), "media")


async def completion(model, turns, features, sampling) -> pb.Completion:
    clock = telemetry.start_clock()
    media = [visual(each) for each in features]
    events = [event async for event in model.answer(asked(model, turns, sampling), media, clock)]
    assert all(isinstance(event, pb.TextDelta) and event.text for event in events[:-1])
    return events[-1]


async def answer(model, turns, features, max_tokens=ANSWER_TOKENS) -> list[int]:
    sampling = Sampling(max_tokens=max_tokens)
    return list((await completion(model, turns, features, sampling)).token_ids)


def noise(seed: int, side: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# the stock model's tokens


async def test_every_sample_question_is_answered_as_by_the_stock_model_token_for_token(embedded):
    stock = stock_of(EMBEDDED_MODEL)
    features: dict[str, torch.Tensor] = {}
    for sample in questions():
        with Image.open(SAMPLES / sample["image"]) as picture:
            picture.load()
        if sample["image"] not in features:
            features[sample["image"]] = stock.features(picture)
        turns = [user("", sample["question"])]
        ours = await answer(embedded, turns, [features[sample["image"]]])
        assert ours == stock.answer(turns, [picture]), sample


@pytest.mark.parametrize("tied", [False, True], ids=["own output matrix", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_random_models_of_every_layout_answer_as_stock(tmp_path, layout, tied):
    path = make_llava(tmp_path / "model", seed=2, layout=layout, tied=tied)
    stock, model = stock_of(path), await started(path)
    for seed in range(3):
        picture, turns = noise(seed, 64), [user("", "what is this ?")]
        assert await answer(model, turns, [stock.features(picture)], 32) == stock.answer(turns, [picture], 32)
    await model.engine.stop()


async def test_a_model_stored_in_half_precision_answers_as_stock(tmp_path):
    path = make_llava(tmp_path / "model", seed=3, dtype=torch.float16)
    stock, model = stock_of(path), await started(path)
    picture, turns = noise(0, 64), [user("", "what is this ?")]
    assert await answer(model, turns, [stock.features(picture)]) == stock.answer(turns, [picture])
    await model.engine.stop()


async def test_several_pictures_and_turns_are_answered_as_by_stock(tiny, tiny_path):
    stock = stock_of(tiny_path)
    pictures = [noise(seed, 64) for seed in range(3)]
    turns = [
        user("", "what is this ?", ""),
        assistant("a red ring"),
        user("and this ?"),
        assistant("a star"),
        user("count the shapes .", ""),
    ]
    features = [stock.features(picture) for picture in pictures]
    assert await answer(tiny, turns, features, 40) == stock.answer(turns, pictures, 40)


async def test_words_alone_are_answered_as_by_stock(tiny, tiny_path):
    turns = [user("hello , what do you see ?")]
    assert await answer(tiny, turns, [], 40) == stock_of(tiny_path).answer(turns, [], 40)


async def test_kept_tokens_take_the_place_of_all_in_their_order(tiny, tiny_path):
    stock, turns = stock_of(tiny_path), [user("", "what is this ?")]
    features = stock.features(noise(0, 64))
    kept = torch.tensor([0, 3, 17, 31, 62])
    with torch.no_grad():
        rows = stock.model.model.multi_modal_projector(features[None])[0, kept]
        ids = list(asked(tiny, turns).prompt.token_ids)
        place = ids.index(4)
        words = stock.model.get_input_embeddings()(torch.tensor(ids))
        prompt = torch.cat([words[:place], rows, words[place + 1 :]])[None]
        reference = stock.model.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long),
            max_new_tokens=32,
            do_sample=False,
        )
    ours = await completion(tiny, turns, [features[kept]], Sampling(max_tokens=32))
    assert list(ours.token_ids) == reference[0].tolist()
    assert ours.usage.prompt_tokens == len(ids) - 1 + len(kept)
    assert ours.usage.visual_tokens_after == len(kept)


def test_the_projection_of_kept_tokens_is_the_kept_part_of_the_projection(tiny, tiny_path):
    features = stock_of(tiny_path).features(noise(0, 64))
    with torch.no_grad():
        whole = stock_of(tiny_path).model.model.multi_modal_projector(features[None])[0]
    kept = torch.tensor([1, 5, 40])
    torch.testing.assert_close(
        tiny.adapter.project(visual(features[kept])), whole[kept], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        tiny.adapter.project(visual(features.to(torch.bfloat16))), whole, rtol=0.05, atol=0.05
    )


# what is loaded


def test_only_the_projector_and_the_language_model_are_loaded(tiny, tiny_path):
    stock = stock_of(tiny_path).model
    held = dict(tiny.engine._model.named_parameters())
    assert not [name for name in held if "vision" in name or "projector" in name]
    language = [*stock.model.language_model.parameters(), stock.lm_head.weight]
    assert sum(each.numel() for each in held.values()) == sum(each.numel() for each in language)
    projector = sum(each.numel() for each in stock.model.multi_modal_projector.parameters())
    assert sum(each.numel() for each in tiny.adapter._projector.parameters()) == projector


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("multi_modal_projector.linear_2.bias", "projector"),
        ("language_model.model.layers.1.mlp.up_proj.weight", "language model"),
        ("language_model.lm_head.weight", "language model"),
    ],
)
async def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_the_tensors_name(tmp_path, key, part):
    path = make_llava(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    del weights[key]
    save_file(weights, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=key.removeprefix("language_model.")) as refused:
        await started(path)
    assert part in str(refused.value)


async def test_a_projector_of_another_shape_is_refused(tmp_path):
    path = make_llava(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights["multi_modal_projector.linear_1.weight"] = torch.zeros(64, 40)
    save_file(weights, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"linear_1.weight has shape \(64, 40\)"):
        await started(path)


async def test_the_models_own_end_tokens_hold_and_its_taste_in_drawing_does_not(tmp_path, recwarn):
    path = make_llava(tmp_path / "model", seed=1)
    plain = await started(path)
    turns = [user("hello , what do you see ?")]
    tokens = await answer(plain, turns, [], 40)
    await plain.engine.stop()
    end = next(token for token in tokens[3:] if token not in tokens[:3])
    own = {"eos_token_id": [3, end], "do_sample": True, "temperature": 0.3, "top_p": 0.5, "max_length": 4096}
    (path / "generation_config.json").write_text(json.dumps(own))
    model = await started(path)
    assert model.engine.end_tokens == {3, end}
    shortened = await completion(model, turns, [], Sampling(max_tokens=40))
    assert list(shortened.token_ids) == tokens[: tokens.index(end) + 1]
    assert shortened.finish_reason == pb.FINISH_REASON_STOP
    await model.engine.stop()
    assert not recwarn.list


async def test_the_models_own_repetition_penalty_covers_the_prompt_as_stock_has_it(tmp_path):
    path = make_llava(tmp_path / "model", seed=2)
    turns = [user("", "what colour is the circle , and which shape is blue ?")]
    free = stock_of(path).answer(turns, [noise(3, 64)], 24)
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.3}))
    stock = Stock(
        LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval(),
        AutoProcessor.from_pretrained(path),
    )
    penalised = stock.answer(turns, [noise(3, 64)], 24)
    assert penalised != free
    model = await started(path)
    assert await answer(model, turns, [stock.features(noise(3, 64))], 24) == penalised
    await model.engine.stop()


async def test_the_dtype_is_the_one_that_is_set(tiny_path):
    model = await started(tiny_path, dtype="bfloat16")
    assert {each.dtype for each in model.engine._model.parameters()} == {torch.bfloat16}
    features = stock_of(tiny_path).features(noise(0, 64))
    assert model.adapter.project(visual(features)).dtype == torch.bfloat16
    assert await answer(model, [user("", "what is this ?")], [features])
    await model.engine.stop()


# how an answer ends


async def test_max_tokens_ends_an_answer_and_says_length(tiny):
    ended = await completion(tiny, [user("hello")], [], Sampling(max_tokens=5))
    assert len(ended.token_ids) == ended.usage.completion_tokens == 5
    assert ended.finish_reason == pb.FINISH_REASON_LENGTH


async def test_the_context_ends_an_answer_and_says_length(tmp_path):
    path = make_llava(tmp_path / "model", seed=0, context=24)
    model = await started(path)
    ended = await completion(model, [user("hello there , what do you see ?")], [], Sampling(max_tokens=100))
    assert ended.usage.prompt_tokens + ended.usage.completion_tokens == 24
    assert ended.finish_reason == pb.FINISH_REASON_LENGTH
    await model.engine.stop()


async def test_a_stop_string_ends_an_answer_before_it_and_says_stop(tiny):
    turns, clock = [user("hello")], telemetry.start_clock()
    whole = [event async for event in tiny.answer(asked(tiny, turns, Sampling(max_tokens=30)), [], clock)]
    text = "".join(event.text for event in whole[:-1])
    stop = text.split()[3]
    sampling = Sampling(max_tokens=30, stop=(stop,))
    cut = [event async for event in tiny.answer(asked(tiny, turns, sampling), [], clock)]
    assert "".join(event.text for event in cut[:-1]) == text[: text.index(stop)]
    assert cut[-1].finish_reason == pb.FINISH_REASON_STOP
    assert len(cut[-1].token_ids) < len(whole[-1].token_ids)


async def test_prefill_and_decode_are_timed(tiny):
    ended = await completion(tiny, [user("hello")], [], Sampling(max_tokens=20))
    seconds = {timing.stage: timing.duration.ToMicroseconds() for timing in ended.timings}
    assert list(seconds) == ["project", "prefill", "decode"]
    assert all(value > 0 for value in seconds.values())


# leaving early


def long_job(model: LanguageModel, max_tokens: int) -> Job:
    prompt = asked(model, [user("hello")]).prompt
    embeddings = model.engine.embed(prompt.token_ids)
    spliced = SplicedPrompt(embeddings, torch.arange(len(embeddings)), visual_tokens=0)
    return Job(spliced, (), GREEDY, max_tokens)


@pytest.fixture
async def narrow(tiny_path):
    """A model that has room for one answer at a time, never ends by itself, and the calls it has seen."""
    model = await started(tiny_path, max_concurrency=1)
    model.engine._generation_config.eos_token_id = None
    calls = Counter()
    model.engine._model.register_forward_hook(lambda *_: calls.update(["forward"]))
    yield model, calls
    await model.engine.stop()


async def test_leaving_early_ends_the_work_at_the_next_token(narrow):
    model, calls = narrow
    tokens = model.engine.generate(long_job(model, 450))
    seen = 0
    async with aclosing(tokens):
        async for _ in tokens:
            seen += 1
            if seen == 3:
                at_leaving = calls["forward"]
                break
    after = calls["forward"]
    assert after <= at_leaving + 2 < 450
    await asyncio.sleep(0.1)
    assert calls["forward"] == after


async def test_cancelling_the_reader_ends_the_work_and_frees_the_slot(narrow):
    model, calls = narrow

    begun = asyncio.Event()

    async def read(limit: int) -> int:
        count = 0
        async with aclosing(model.engine.generate(long_job(model, limit))) as tokens:
            async for _ in tokens:
                count += 1
                begun.set()
        return count

    reader = asyncio.create_task(read(450))
    await asyncio.wait_for(begun.wait(), 30)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    ended = calls["forward"]
    assert ended < 450
    assert await read(4) == 4
    assert calls["forward"] == ended + 4


async def test_work_that_has_not_begun_when_its_reader_leaves_never_begins(narrow):
    model, calls = narrow
    first = model.engine.generate(long_job(model, 450))
    await anext(first)  # holds the only thread
    second = model.engine.generate(long_job(model, 5))
    waiting = asyncio.create_task(anext(second))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await first.aclose()
    ended = calls["forward"]
    await asyncio.sleep(0.1)
    assert calls["forward"] == ended


async def test_an_error_in_the_model_reaches_the_reader_and_the_slot_is_free_again(narrow):
    model, _ = narrow
    job = long_job(model, 5)
    narrow_rows = dataclasses.replace(job.prompt, embeddings=job.prompt.embeddings[:, :7])
    with pytest.raises(RuntimeError):
        async for _ in model.engine.generate(dataclasses.replace(job, prompt=narrow_rows)):
            pass
    assert len([step async for step in model.engine.generate(job)]) == 5


# draws


async def drawn(model, seed=None, temperature=1.0, top_p=1.0, max_tokens=24) -> list[int]:
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    return list((await completion(model, [user("hello")], [], sampling)).token_ids)


async def test_a_seed_repeats_a_draw_and_another_seed_another(tiny):
    assert await drawn(tiny, seed=7) == await drawn(tiny, seed=7)
    assert len({tuple(await drawn(tiny, seed=seed)) for seed in range(4)}) == 4
    assert await drawn(tiny, seed=-1) == await drawn(tiny, seed=-1)


async def test_without_a_seed_each_draw_is_new(tiny):
    assert await drawn(tiny) != await drawn(tiny)


async def test_concurrent_draws_are_the_same_as_alone(tiny):
    alone = [await drawn(tiny, seed=seed) for seed in range(6)]
    together = await asyncio.gather(*(drawn(tiny, seed=seed) for seed in range(6)))
    assert together == alone


async def test_drawing_leaves_torchs_global_generator_alone(tiny):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    await drawn(tiny, seed=1)
    await drawn(tiny)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", [{"temperature": 1e-300}, {"temperature": 1e-4}, {"top_p": 1e-9}], ids=str)
async def test_a_vanishing_temperature_or_nucleus_is_greedy(tiny, how):
    assert await drawn(tiny, seed=1, **how) == await drawn(tiny, temperature=0.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_temperature(temperature):
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
    expected = (scores[0] / temperature).softmax(-1)
    sampler = SeededSampler(Sampling(temperature=temperature, seed=3))
    count = 2000
    counts = Counter(int(sampler(torch.zeros(1, 0), scores).argmax()) for _ in range(count))
    for token, share in enumerate(expected.tolist()):
        assert counts[token] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)


def test_draws_stay_within_the_nucleus():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    sampler = SeededSampler(Sampling(temperature=1.0, top_p=0.75, seed=3))
    drawn = {int(sampler(torch.zeros(1, 0), scores).argmax()) for _ in range(300)}
    assert drawn == {0, 1}


def test_a_draw_leaves_one_token_and_the_scores_as_they_were():
    scores = torch.randn(1, 50)
    kept = scores.clone()
    out = SeededSampler(Sampling(temperature=1.0, seed=3))(torch.zeros(1, 0), scores)
    assert torch.isfinite(out).sum() == 1
    assert torch.equal(scores, kept)
