"""What vLLM has of an earlier prompt it does not read again: images before text, turns of a conversation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hiprune.client import Answer, Client, question_message
from hiprune.stack import Stack
from hiprune.v1 import llm_service_pb2, pruner_service_pb2
from tests.stacks import picture
from tests.tiny import make_llava
from tests.tiny_anyres import make_clip
from tests.vllm.test_families import ENGINE

pytestmark = [pytest.mark.extra, pytest.mark.vllm]

HIPRUNE = pruner_service_pb2.METHOD_HIPRUNE
PLUS_PLUS = pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS
KEEP = 345
"""Of 576; with what stands before them they fill two blocks of 128, and most of a third."""
HIT = 256
SIZE = {"image_size": 96, "patch_size": 4}


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    """A random model of 576 visual tokens with a paired text encoder, on vLLM."""
    folder = tmp_path_factory.mktemp("models")
    model = make_llava(folder / "llava", **SIZE, context=1024)
    clip = make_clip(folder / "clip", **SIZE, intermediate_size=96, hidden_act="gelu")
    paired = {f"HIPRUNE_{service}_PAIRED_MODEL": str(clip) for service in ("ENCODER", "PRUNER")}
    with Stack(model=str(model), redis=False, environ={**ENGINE, **paired}) as running:
        yield running


async def ask(client: Client, method, *turns: str, image: str = "scene00.png") -> Answer:
    """Questions and answers in turn, the picture with the first question."""
    messages = [question_message(turns[0], [picture(image)])]
    for number, text in enumerate(turns[1:]):
        role = llm_service_pb2.ROLE_USER if number % 2 else llm_service_pb2.ROLE_ASSISTANT
        part = llm_service_pb2.Part(text=text)
        messages.append(llm_service_pb2.Message(role=role, parts=[part]))
    request = llm_service_pb2.AskImageRequest(
        messages=messages,
        policy=pruner_service_pb2.PrunePolicy(method=method, keep_count=KEEP),
        sampling=llm_service_pb2.Sampling(max_tokens=8),
    )
    answer = Answer()
    async for event in client.ask_stream(request):
        match event.WhichOneof("event"):
            case "report":
                answer.report = event.report
            case "delta":
                answer.text += event.delta.text
            case "completion":
                answer.completion = event.completion
    assert answer.report.media[0].summary.tokens_kept == KEEP
    return answer


def cached(answer: Answer) -> int:
    return answer.completion.usage.prompt_tokens_cached


async def test_under_hiprune_another_question_about_an_image_reads_its_text_alone(stack):
    async with Client(stack.address) as client:
        assert cached(await ask(client, HIPRUNE, "which colour is the circle ?")) == 0
        assert cached(await ask(client, HIPRUNE, "how many shapes are there ?")) >= HIT
        assert cached(await ask(client, HIPRUNE, "how many ?", image="scene01.png")) < 128


async def test_under_hiprune_plus_plus_later_turns_of_a_conversation_do(stack):
    async with Client(stack.address) as client:
        turns = ["which colour is the square ?"]
        first = await ask(client, PLUS_PLUS, *turns)
        for question in ("and the circle ?", "which is larger ?"):
            turns += [first.text or "red", question]
            assert cached(await ask(client, PLUS_PLUS, *turns)) >= HIT


async def test_what_vllm_has_changes_no_answer(stack):
    async with Client(stack.address) as client:
        once = await ask(client, HIPRUNE, "is there a triangle ?", image="scene02.png")
        again = await ask(client, HIPRUNE, "is there a triangle ?", image="scene02.png")
    assert cached(once) == 0
    assert cached(again) >= HIT
    assert list(once.completion.token_ids) == list(again.completion.token_ids)
