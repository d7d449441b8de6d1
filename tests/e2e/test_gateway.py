"""Claims about the gateway as a process: real services, the embedded model, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import openai
import pytest

from hiprune.client import Client
from hiprune.stack import Stack, answers_ready, free_port
from hiprune.v1 import llm_service_pb2
from hiprune.v1 import pruner_service_pb2 as pb
from tests.certificates import Authority
from tests.gateways import ScriptedLlm, scripted_llm
from tests.stacks import TOKENS, picture, questions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "http.md"


def image(name: str) -> dict[str, object]:
    data = base64.b64encode(picture(name)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def turn(question: str, *names: str) -> dict[str, object]:
    return {"role": "user", "content": [*map(image, names), {"type": "text", "text": question}]}


@pytest.fixture(scope="module")
def address(stack: Stack) -> Iterator[str]:
    yield stack.start_gateway()
    stack.end("gateway")


@pytest.fixture
async def openai_client(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


async def test_the_answer_over_http_is_the_answer_over_grpc(openai_client, client: Client):
    policy = pb.PrunePolicy(method=pb.METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.25, include_scores=True)
    for sample in questions()[:4]:
        there = await client.ask(
            sample["question"],
            picture(sample["image"]),
            policy=policy,
            sampling=llm_service_pb2.Sampling(max_tokens=8),
        )
        here = await openai_client.chat.completions.create(
            model="llava",
            messages=[turn(sample["question"], sample["image"])],
            max_tokens=8,
            extra_body={"pruning": {"method": "hiprune++", "keep": 0.25, "scores": True}},
        )
        usage, expected = here.usage, there.completion.usage
        assert here.choices[0].message.content == there.text
        assert usage.prompt_tokens == expected.prompt_tokens
        assert usage.completion_tokens == expected.completion_tokens
        assert usage.prompt_tokens_details.visual_tokens_before == TOKENS
        assert usage.prompt_tokens_details.visual_tokens_after == TOKENS // 4
        (pruned,) = here.pruning["images"]
        assert pruned["cache"] == "pruned hit"
        (view,) = there.report.media[0].views
        assert pruned["views"][0]["kept_indices"] == list(view.kept_indices)
        assert {"anchor", "buffer", "register", "text"} == set(pruned["views"][0]["kinds"])
        tokens = view.grid_height * view.grid_width
        assert {name: len(each) for name, each in pruned["views"][0]["scores"].items()} == dict.fromkeys(
            ("object", "deep", "similarity"), tokens
        )
        assert pruned["policy"]["object_layer"] < pruned["policy"]["deep_layer"]
        assert pruned["policy"]["keep"] == 0.25
        assert pruned["text_model"]
        details = usage.prompt_tokens_details
        assert details.prefill_flops_after < details.prefill_flops_before


async def test_a_stream_is_the_whole_answer_in_pieces(openai_client):
    asked = {"model": "llava", "messages": [turn("count the shapes .", "scene01.png")], "max_tokens": 8}
    whole = await openai_client.chat.completions.create(**asked)
    stream = await openai_client.chat.completions.create(**asked, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole.choices[0].message.content


async def test_two_images_and_a_later_turn_are_answered(openai_client):
    first = turn("count the shapes .", "scene00.png", "scene01.png")
    answer = await openai_client.chat.completions.create(
        model="llava", messages=[first], extra_body={"pruning": {"keep": 40}}
    )
    assert [each["tokens_kept"] for each in answer.pruning["images"]] == [40, 40]
    later = await openai_client.chat.completions.create(
        model="llava",
        messages=[
            first,
            answer.choices[0].message.model_dump(),
            {"role": "user", "content": "count the shapes ."},
        ],
        extra_body={"pruning": {"keep": 40}},
    )
    assert {each["cache"] for each in later.pruning["images"]} == {"pruned hit"}
    assert later.choices[0].finish_reason in ("stop", "length")


async def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(openai_client):
    asked = {"model": "llava", "messages": [turn("which colour is the circle ?", "scene00.png")]}
    whole = (await openai_client.chat.completions.create(**asked)).choices[0].message.content
    middle = len(whole) // 2
    stop = whole[middle : middle + 2]
    cut = await openai_client.chat.completions.create(**asked, stop=stop)
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"stop": ["x"] * 9}, openai.BadRequestError, "stop"),
        ({"extra_body": {"pruning": {"alpha": 2}}}, openai.BadRequestError, "pruning.alpha"),
        ({"extra_body": {"pruning": {"keep": 0}}}, openai.BadRequestError, "pruning.keep"),
        ({"extra_body": {"pruning": {"object_layer": 99}}}, openai.BadRequestError, "pruning.object_layer"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        (
            {"messages": [{"role": "user", "content": "a </s> b"}]},
            openai.BadRequestError,
            "messages[0].content",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "?"},
                            {
                                "type": "image_url",
                                "image_url": {"url": "data:image/png;base64,aGVsbG8="},
                            },
                        ],
                    }
                ]
            },
            openai.BadRequestError,
            "messages[0].content[1].image_url.url",
        ),
    ],
)
async def test_what_the_services_refuse_is_named_as_the_client_wrote_it(openai_client, fields, error, param):
    asked = {"model": "llava", "messages": [turn("?", "scene00.png")], **fields}
    with pytest.raises(error) as refused:
        await openai_client.chat.completions.create(**asked)
    assert refused.value.param == param


@pytest.mark.extra
def test_the_documented_example_answers(address):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    assert "127.0.0.1:8080" in program
    program = program.replace("127.0.0.1:8080", address)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=PAGE.parents[1], capture_output=True, text=True, check=False)
    assert re.fullmatch(rf".+ \(from {TOKENS // 4} of {TOKENS} visual tokens\)\n", done.stdout), done.stderr


@asynccontextmanager
async def process_of(llm: ScriptedLlm, *flags: str) -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    """A gateway's process before a scripted llm, and its address."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "services.gateway", "--listen", address, "--llm", llm.address, *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)  # noqa: ASYNC220  # at once
    try:
        yield process, address
    finally:
        process.kill()
        process.communicate()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110  # in another process
            await asyncio.sleep(0.05)


async def test_on_sigterm_streams_end_before_the_gateway_does():
    async with scripted_llm() as llm, process_of(llm) as (process, address):
        go_on = asyncio.Event()

        async def pace(place: int) -> None:
            if place == 1:
                await go_on.wait()

        llm.pace = pace
        await until(lambda: answers_ready(address))
        async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="k") as client:
            stream = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "?"}], stream=True
            )
            words = aiter(stream)
            seen = [await anext(words), await anext(words)]
            process.send_signal(signal.SIGTERM)
            await until(lambda: not answers_ready(address))
            go_on.set()
            seen += [chunk async for chunk in words]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in seen) == "a red circle"
        assert await asyncio.to_thread(process.wait, 20) == 0


@pytest.mark.extra
async def test_a_stream_that_outlives_the_drain_is_told_so():
    async with scripted_llm() as llm, process_of(llm, "--drain-ms", "300") as (process, address):

        async def pace(place: int) -> None:
            if place == 1:
                await asyncio.Event().wait()

        llm.pace = pace
        await until(lambda: answers_ready(address))
        async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="k") as client:
            stream = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "?"}], stream=True
            )
            words = aiter(stream)
            await anext(words)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="leaves before the answer has ended"):
                [chunk async for chunk in words]
        assert await asyncio.to_thread(process.wait, 20) == 0
        async with asyncio.timeout(5):
            await llm.asked[0].ended.wait()


@pytest.mark.extra
async def test_its_requests_show_on_its_page_for_prometheus_and_its_logs_are_json():
    metrics = f"127.0.0.1:{free_port()}"
    flags = ("--metrics-listen", metrics, "--log-format", "json", "--log-level", "debug")
    asked = {"model": "m", "messages": [{"role": "user", "content": "canaryquestion"}]}
    async with scripted_llm() as llm, process_of(llm, *flags) as (process, address):
        await until(lambda: answers_ready(address))
        async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="canarykey") as client:
            await client.chat.completions.create(**asked)
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**asked, temperature="canarytemperature")
        async with httpx2.AsyncClient(trust_env=False) as http:
            page = (await http.get(f"http://{metrics}/metrics")).text
        process.terminate()
        _, said = await asyncio.to_thread(process.communicate, None, 20)
    assert 'hiprune_rpc_duration_seconds_count{code="OK",rpc="AskImage"} 1' in page
    assert 'hiprune_rpc_duration_seconds_count{code="INVALID_ARGUMENT",rpc="AskImage"} 1' in page
    assert 'reason="INVALID_FIELD"' in page
    lines = [json.loads(line) for line in said.decode().splitlines()]
    statuses = [line["status"] for line in lines if line.get("route") == "/v1/chat/completions"]
    assert statuses == [200, 400]
    assert "canary" not in said.decode() + page


@pytest.mark.extra
async def test_it_speaks_tls_with_the_certificate_that_is_in_its_files_now(tmp_path):
    before, after = Authority("before"), Authority("after")
    certificate, key, authority = before.write(tmp_path)

    def answers(trusted: ssl.SSLContext) -> bool:
        try:
            with httpx2.Client(verify=trusted, trust_env=False) as http:
                return http.get(f"https://{address}/healthz").status_code == 200
        except httpx2.ConnectError:
            return False

    flags = ("--tls-cert", certificate, "--tls-key", key)
    async with scripted_llm() as llm, process_of(llm, *flags) as (_, address):
        old = ssl.create_default_context(cafile=authority)
        await until(lambda: answers(old))
        after.write(tmp_path)
        new = ssl.create_default_context(cafile=authority)
        await until(lambda: answers(new))
        assert not answers(old)
