"""Claims about whole answers: three real processes, real gRPC, a real Redis, the embedded model."""

from __future__ import annotations

import asyncio
import io

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hiprune.client import Client, question_message
from hiprune.config import EMBEDDED_MODEL
from hiprune.stack import Stack
from hiprune.v1 import llm_service_pb2, pruner_service_pb2
from tests.stacks import SAMPLES, THIRD, one_of_each_picture, picture, questions

NONE = pruner_service_pb2.METHOD_NONE
HIPRUNE = pruner_service_pb2.METHOD_HIPRUNE
PLUS_PLUS = pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS
ANSWER_TOKENS = 16


def policy(method, **fields):
    return pruner_service_pb2.PrunePolicy(method=method, **fields)


@pytest.fixture(scope="module")
def stock_answers() -> list[list[int]]:
    """Token ids of the stock model's greedy answer to every sample question."""
    model = LlavaForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    answers = []
    for sample in questions():
        content = [{"type": "image"}, {"type": "text", "text": sample["question"]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        with Image.open(SAMPLES / sample["image"]) as image:
            inputs = processor(images=image, text=prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


@pytest.mark.parametrize(
    "everything",
    [policy(NONE), policy(HIPRUNE, keep_ratio=1.0), policy(PLUS_PLUS, keep_count=100_000)],
    ids=["none", "hiprune 100 %", "hiprune++ more than all"],
)
async def test_keeping_every_token_answers_as_the_stock_model_token_for_token(
    client, stock_answers, everything
):
    sampling = llm_service_pb2.Sampling(max_tokens=ANSWER_TOKENS)
    for sample, stock in zip(questions(), stock_answers, strict=True):
        answer = await client.ask(
            sample["question"], picture(sample["image"]), policy=everything, sampling=sampling
        )
        assert list(answer.completion.token_ids) == stock, sample
        assert answer.completion.usage.completion_tokens == len(stock)


async def test_a_third_of_the_tokens_answers_nine_of_ten_that_the_whole_answers(client):
    asked = right = 0
    for sample in questions():
        if sample["type"] not in {"colour", "shape", "exist"} or sample["unpruned_answer"] != sample["truth"]:
            continue
        answer = await client.ask(sample["question"], picture(sample["image"]), policy=policy(HIPRUNE))
        asked += 1
        right += answer.text.strip() == sample["truth"]
    assert asked >= 30
    assert right >= 0.9 * asked, f"{right} of {asked}"


@pytest.mark.parametrize(
    "method", ["HIPRUNE", "HIPRUNE_PLUS_PLUS", "RANDOM", "STRIDED", "VISIONZIP", "DIVPRUNE"]
)
async def test_the_report_says_what_was_kept_and_the_usage_agrees(client, method):
    sample = questions()[0]
    number = pruner_service_pb2.Method.Value(f"METHOD_{method}")
    chosen = policy(number, keep_count=THIRD, include_scores=True)
    answer = await client.ask(sample["question"], picture(sample["image"]), policy=chosen)
    (report,) = answer.report.media
    (view,) = report.views
    total = view.grid_height * view.grid_width
    assert report.summary.tokens_before == total
    assert report.summary.tokens_requested == report.summary.tokens_kept == THIRD
    indices = list(view.kept_indices)
    assert indices == sorted(set(indices))
    assert len(indices) == len(view.kinds) == THIRD
    assert 0 <= indices[0] <= indices[-1] < total
    reads = method.startswith("HIPRUNE")
    assert view.scores.HasField("object") == view.scores.HasField("deep") == reads
    assert list(view.scores.object.shape) == ([total] if reads else [])
    assert view.scores.HasField("cls") == (method == "VISIONZIP")  # the tower has a CLS
    usage = answer.completion.usage
    assert (usage.visual_tokens_before, usage.visual_tokens_after) == (total, THIRD)
    assert usage.prefill_flops_after < usage.prefill_flops_before
    words = usage.prompt_tokens - THIRD
    assert 0 < words < 40
    kinds = {pruner_service_pb2.TokenKind.Name(kind).removeprefix("TOKEN_KIND_") for kind in view.kinds}
    expected = {
        "HIPRUNE": {"ANCHOR", "BUFFER", "REGISTER"},
        "HIPRUNE_PLUS_PLUS": {"ANCHOR", "BUFFER", "REGISTER", "TEXT"},
        "RANDOM": {"CONTROL"},
        "STRIDED": {"CONTROL"},
        "VISIONZIP": {"DOMINANT"},
        "DIVPRUNE": {"DIVERSE"},
    }
    assert kinds == expected[method]
    if method == "HIPRUNE_PLUS_PLUS":
        assert list(view.kinds).count(pruner_service_pb2.TOKEN_KIND_TEXT) == round(0.1 * THIRD)
        assert report.summary.text_model


async def test_text_guidance_keeps_the_tokens_most_like_the_question(client):
    sample = questions()[0]
    answer = await client.ask(
        sample["question"],
        picture(sample["image"]),
        policy=policy(PLUS_PLUS, keep_count=40, beta=0.5, include_scores=True),
    )
    view = answer.report.media[0].views[0]
    similarity = torch.frombuffer(bytearray(view.scores.similarity.data), dtype=torch.float32)
    by_text = {
        index
        for index, kind in zip(view.kept_indices, view.kinds, strict=True)
        if kind == pruner_service_pb2.TOKEN_KIND_TEXT
    }
    others = set(view.kept_indices) - by_text
    assert len(by_text) == 20
    expected = [
        index for index in similarity.argsort(descending=True, stable=True).tolist() if index not in others
    ]
    assert by_text == set(expected[:20])


async def test_a_question_longer_than_the_text_encoder_works_and_its_end_matters(client):
    image = picture(questions()[0]["image"])
    padding = "is there a shape in the image ? " * 12  # about 100 tokens: a chunk, and the end in the next
    kept = {}
    for ending in ("where is the cyan circle ?", "what is the white shape ?"):
        answer = await client.ask(padding + ending, image, policy=policy(PLUS_PLUS, keep_count=40, beta=1.0))
        kept[ending] = tuple(answer.report.media[0].views[0].kept_indices)
    assert len(set(kept.values())) == 2


async def test_without_a_question_hiprune_plus_plus_keeps_what_hiprune_keeps_and_says_so(client):
    image = picture(questions()[0]["image"])
    plain = await client.ask("", image, policy=policy(HIPRUNE, keep_count=50))
    guided = await client.ask("", image, policy=policy(PLUS_PLUS, keep_count=50))
    assert guided.report.media[0].views[0].kept_indices == plain.report.media[0].views[0].kept_indices
    assert guided.report.media[0].summary.text_note == "no question"


async def test_a_later_turn_keeps_the_tokens_of_the_first_and_answers(client):
    sample = questions()[0]
    first = question_message(sample["question"], [picture(sample["image"])])
    one = await client.ask(sample["question"], picture(sample["image"]), policy=policy(PLUS_PLUS))
    turns = [
        first,
        llm_service_pb2.Message(
            role=llm_service_pb2.ROLE_ASSISTANT, parts=[llm_service_pb2.Part(text=one.text.strip())]
        ),
        question_message("count the shapes .", []),
    ]
    request = llm_service_pb2.AskImageRequest(messages=turns, policy=policy(PLUS_PLUS))
    events = [event async for event in client.ask_stream(request)]
    (report,) = events[0].report.media
    assert report.cache == pruner_service_pb2.CACHE_STATUS_PRUNED_HIT
    assert report.views[0].kept_indices == one.report.media[0].views[0].kept_indices
    assert "".join(event.delta.text for event in events).strip()
    assert events[-1].completion.finish_reason == llm_service_pb2.FINISH_REASON_STOP


async def test_two_images_in_one_turn_are_each_pruned_for_themselves(client):
    images = [picture("scene00.png"), picture("scene01.png")]
    both = await client.ask("count the shapes .", *images, policy=policy(HIPRUNE, keep_count=40))
    for place, image in enumerate(images):
        alone = await client.ask("count the shapes .", image, policy=policy(HIPRUNE, keep_count=40))
        assert both.report.media[place].views == alone.report.media[0].views
    assert both.completion.usage.visual_tokens_after == 80


async def test_a_conversation_without_an_image_is_answered(client):
    answer = await client.ask("count the shapes .", sampling=llm_service_pb2.Sampling(max_tokens=3))
    assert not answer.report.media
    assert answer.completion.usage.visual_tokens_before == 0
    assert len(answer.completion.token_ids) <= 3


async def test_events_come_in_order_report_deltas_completion(client):
    sample = questions()[0]
    request = llm_service_pb2.AskImageRequest(
        messages=[question_message(sample["question"], [picture(sample["image"])])]
    )
    kinds = [event.WhichOneof("event") async for event in client.ask_stream(request)]
    assert kinds[0] == "report"
    assert kinds[-1] == "completion"
    assert set(kinds[1:-1]) == {"delta"}


def unseen(name: str) -> bytes:
    """The same picture in other bytes, which no other test has shown to the stack."""
    with Image.open(SAMPLES / name) as image:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
    return file.getvalue()


async def test_sixteen_concurrent_questions_are_answered_as_one_at_a_time(stack):
    samples = one_of_each_picture()
    async with Client(stack.address) as client:
        # at once first, so that these are the ones that share forwards and not the cache
        together = await asyncio.gather(
            *(client.ask(each["question"], unseen(each["image"]), policy=policy(HIPRUNE)) for each in samples)
        )
        assert {answer.report.media[0].cache for answer in together} == {pruner_service_pb2.CACHE_STATUS_MISS}
    with Stack(redis=False, environ={"HIPRUNE_PRUNER_CACHE": "off"}) as apart:
        async with Client(apart.address) as client:
            alone = [
                (await client.ask(each["question"], unseen(each["image"]), policy=policy(HIPRUNE))).text
                for each in samples
            ]
    assert [answer.text for answer in together] == alone


async def test_every_stage_of_a_miss_is_timed(client):
    image = picture("scene15.png")
    answer = await client.ask("count the shapes .", image, policy=policy(PLUS_PLUS, alpha=0.123))
    stages = {timing.stage for timing in answer.report.media[0].timings}
    assert {"cache_get", "select", "prune"} <= stages
    assert {"project", "prefill", "decode"} <= {timing.stage for timing in answer.completion.timings}
