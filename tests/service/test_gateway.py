"""The gateway, asked by OpenAI's own client over real HTTP; behind it an llm that answers by a script."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest

from hiprune.errors import (
    Exhausted,
    Expired,
    HipruneError,
    Internal,
    InvalidInput,
    Mismatch,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from hiprune.v1 import llm_service_pb2
from hiprune.v1 import pruner_service_pb2 as pruner_pb
from services.gateway import answers, chat, reports
from services.gateway.backend import Backend
from services.gateway.fetch import Fetcher
from tests.gateways import KEY, MODEL, ScriptedLlm, gateway, scripted_llm

ASK = [{"role": "user", "content": "which colour is the circle ?"}]
PNG = b"\x89PNG not looked at here"
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def image(url: str = DATA_URL) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture(scope="module")
async def served() -> AsyncIterator[tuple[ScriptedLlm, str]]:
    async with scripted_llm() as scripted, gateway(scripted.address) as address:
        yield scripted, address


@pytest.fixture
def llm(served: tuple[ScriptedLlm, str]) -> ScriptedLlm:
    """The llm, as if it had just been started."""
    served[0].reset()
    return served[0]


@pytest.fixture
def url(llm: ScriptedLlm, served: tuple[ScriptedLlm, str]) -> str:
    return served[1]


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as connected:
        yield connected


# --- answers -----------------------------------------------------------------------------------------------


async def test_an_answer_comes_in_one_piece_with_usage_and_report(client, llm):
    answer = await client.chat.completions.create(model=MODEL, messages=ASK)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "a red circle")
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.usage.prompt_tokens == 80
    assert answer.usage.total_tokens == 83
    details = answer.usage.prompt_tokens_details
    assert details.cached_tokens == 7
    assert (details.visual_tokens_before, details.visual_tokens_after) == (196, 65)
    (pruned,) = answer.pruning["images"]
    assert pruned == {
        "method": "hiprune",
        "tokens_before": 196,
        "tokens_requested": 65,
        "tokens_kept": 65,
        "cache": "miss",
    }


async def test_an_answer_comes_as_a_stream_that_openais_client_reads(client):
    stream = await client.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].pruning["images"][0]["tokens_kept"] == 65
    words = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert words == ["a ", "red ", "circle"]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])
    details = chunks[-1].usage.prompt_tokens_details
    assert (details.prefill_flops_before, details.prefill_flops_after) == (9_000_000, 3_000_000)
    assert not any(hasattr(chunk, "pruning") for chunk in chunks[1:])


async def test_a_stream_ends_with_done_and_carries_usage_only_if_asked(client, url):
    body = {"model": MODEL, "messages": ASK, "stream": True}
    async with httpx2.AsyncClient() as http:
        answer = await http.post(f"{url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-hiprune-tokens-before"] == "196"
    assert answer.headers["x-hiprune-tokens-kept"] == "65"
    assert answer.headers["x-hiprune-cache"] == "miss"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert '"usage"' not in answer.text


async def test_words_and_images_reach_the_llm_in_their_order_and_turns(client, llm):
    llm.media = 2
    other = "data:image/jpeg;base64," + base64.b64encode(b"another").decode()
    messages = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "first"}, image(), {"type": "text", "text": "then"}],
        },
        {"role": "assistant", "content": "seen"},
        {"role": "user", "content": [image(other), {"type": "text", "text": "and this ?"}]},
    ]
    await client.chat.completions.create(model=MODEL, messages=messages)
    told = llm.asked[0].request.messages
    parts = [
        [part.text if part.WhichOneof("content") == "text" else part.media.image for part in turn.parts]
        for turn in told
    ]
    assert parts == [["be brief"], ["first", PNG, "then"], ["seen"], [b"another", "and this ?"]]
    assert [turn.role for turn in told] == [
        llm_service_pb2.ROLE_SYSTEM,
        llm_service_pb2.ROLE_USER,
        llm_service_pb2.ROLE_ASSISTANT,
        llm_service_pb2.ROLE_USER,
    ]


async def test_an_answer_can_be_sent_back_as_the_client_has_it(client, llm):
    answer = await client.chat.completions.create(model=MODEL, messages=ASK)
    turns = [*ASK, answer.choices[0].message.model_dump(), {"role": "user", "content": "sure ?"}]
    await client.chat.completions.create(model=MODEL, messages=turns)
    assert llm.asked[1].request.messages[1].parts[0].text == "a red circle"


async def test_sampling_and_pruning_reach_the_llm(client, llm):
    await client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        max_completion_tokens=9,
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=2**40,
        stop=["\n", "END"],
        n=1,
        extra_body={
            "pruning": {"method": "hiprune++", "keep": 0.25, "alpha": 0.2, "beta": 0.3, "object_layer": 3}
        },
    )
    asked = llm.asked[0].request
    assert asked.model == MODEL
    assert asked.sampling == llm_service_pb2.Sampling(
        max_tokens=9, temperature=0.5, top_p=0.9, seed=2**40, stop=["\n", "END"]
    )
    assert asked.policy == pruner_pb.PrunePolicy(
        method=pruner_pb.METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.25, alpha=0.2, beta=0.3, object_layer=3
    )


async def test_the_report_tells_which_tokens_were_kept_if_asked(client):
    answer = await client.chat.completions.create(
        model=MODEL, messages=ASK, extra_body={"pruning": {"report": True}}
    )
    (view,) = answer.pruning["images"][0]["views"]
    assert view["kept_indices"] == list(range(65))
    assert set(view["kinds"]) == {"anchor"}
    assert (view["grid_height"], view["grid_width"]) == (14, 14)
    assert "scores" not in view


async def test_scores_come_if_asked_and_bring_the_report(client, llm):
    answer = await client.chat.completions.create(
        model=MODEL, messages=ASK, extra_body={"pruning": {"scores": True}}
    )
    assert llm.asked[0].request.policy == pruner_pb.PrunePolicy(include_scores=True)
    (image_report,) = answer.pruning["images"]
    assert image_report["policy"] == {"method": "hiprune", "keep": 65}
    assert image_report["views"][0]["scores"] == {"object": [index / 4 for index in range(196)]}


@pytest.mark.parametrize("streamed", [False, True])
async def test_many_scores_are_told_beside_the_loop_and_few_at_once(client, llm, monkeypatch, streamed):
    threads = []

    def told(*args: Any, **options: Any) -> Any:
        threads.append(threading.get_ident())
        return reports.pruning_of(*args, **options)

    monkeypatch.setattr(answers, "pruning_of", told)
    for llm.media in (1, 20):
        answer = await client.chat.completions.create(
            model=MODEL, messages=ASK, stream=streamed, extra_body={"pruning": {"scores": True}}
        )
        chunks = [chunk async for chunk in answer] if streamed else [answer]
        images = chunks[0].pruning["images"]
        assert len(images) == llm.media
        assert images[-1]["views"][0]["scores"] == {"object": [index / 4 for index in range(196)]}
    small, large = threads
    assert small == threading.get_ident() != large


async def test_a_stream_with_a_report_ends_with_the_language_models_times(client):
    stream = await client.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, extra_body={"pruning": {"report": True}}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].pruning["images"][0]["timings_ms"] == {"select": 1.5}
    assert chunks[-1].pruning == {"timings_ms": {"prefill": 12.25}}
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_the_payloads_of_lmms_eval_are_answered(url, llm):
    # what lmms_eval.models.chat.openai (lmms-eval 0.7.3) sends: ChatMessages.to_openai_messages, then
    # chat.completions.create(messages, model, max_tokens, temperature), by the synchronous client in a thread
    payload = {
        "messages": [
            {"role": "user", "content": [image(), {"type": "text", "text": "Answer with one word."}]},
        ],
        "model": MODEL,
        "max_tokens": 16,
        "temperature": 0,
    }
    with openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY") as synchronous:
        answer = await asyncio.to_thread(synchronous.chat.completions.create, **payload)
    assert answer.choices[0].message.content == "a red circle"
    usage = answer.usage
    assert usage.prompt_tokens
    assert usage.completion_tokens
    assert usage.completion_tokens_details.reasoning_tokens == 0
    assert llm.asked[0].request.messages[0].parts[0].media.image == PNG


async def test_models_are_listed_and_described(client):
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError) as refused:
        await client.models.retrieve("gpt-5")
    assert refused.value.code == "model_not_found"


async def test_two_hundred_streams_at_once_lose_no_token(url, llm):
    words = [f"{number} " for number in range(40)]
    llm.words = words
    together = asyncio.Event()

    async def pace(place: int) -> None:
        if len(llm.asked) >= 200:
            together.set()
        await together.wait()  # all are under way before any gets its first word
        await asyncio.sleep(0)

    llm.pace = pace
    body = {"model": MODEL, "messages": ASK, "stream": True}
    limits = httpx2.Limits(max_connections=200)
    async with httpx2.AsyncClient(limits=limits, timeout=60) as http:

        async def ask() -> list[str]:
            found = []
            async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        choice = json.loads(line.removeprefix("data: "))["choices"][0]
                        found.append(choice["delta"].get("content", ""))
            return found

        answers = await asyncio.gather(*(ask() for _ in range(200)))
    assert all(answer == ["", *words, ""] for answer in answers)


# --- errors ------------------------------------------------------------------------------------------------

ERRORS = [
    (InvalidInput("is 3, expected 2", field="sampling.max_tokens"), 400, "invalid_field", "max_tokens"),
    (
        InvalidInput("too large", reason="LIMIT_EXCEEDED", field="messages[0].parts[0].text"),
        400,
        "limit_exceeded",
        "messages[0].content",
    ),
    (Unsupported("images only"), 400, "unsupported", None),
    (Unauthenticated("no such key"), 401, "invalid_api_key", None),
    (PermissionDenied("not yours"), 403, "permission_denied", None),
    (NotFound("no such model", field="model"), 404, "model_not_found", "model"),
    (Exhausted("spent", reason="QUOTA", retry_after_s=7.5), 429, "quota", None),
    (Exhausted("full", retry_after_s=1), 503, "overloaded", None),
    (Unavailable("starting"), 503, "unavailable", None),
    (Expired("too late"), 504, "deadline_exceeded", None),
    (Mismatch("other model"), 500, "model_mismatch", None),
    (Internal("internal error"), 500, "internal", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code", "param"), ERRORS)
async def test_an_error_of_the_llm_is_one_of_openais(client, llm, error, status, code, param, stream):
    llm.error = error
    with pytest.raises(openai.APIStatusError) as refused:
        await client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=3, stream=stream)
    found = refused.value
    assert (found.status_code, found.code, found.param) == (status, code, param)
    assert error.message in found.message
    assert found.request_id
    headers = found.response.headers
    if status == 429:
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("8", "7500")
    assert ("retry-after" in headers) is (status in (429, 503))
    assert (headers.get("x-should-retry") == "false") is (status in (500, 504))


@pytest.mark.parametrize("error", [Unavailable("gone"), Internal("internal error")])
async def test_an_error_within_a_stream_reaches_the_client_as_one(client, llm, error: HipruneError):
    llm.error, llm.error_after = error, 2
    found = []
    stream = await client.chat.completions.create(model=MODEL, messages=ASK, stream=True)

    async def read() -> None:
        async for chunk in stream:
            found.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match=error.message) as refused:
        await read()
    assert found == ["", "a ", "red "]
    assert refused.value.code == error.reason.lower()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_ends_without_its_completion_is_an_error(url, llm, stream):
    llm.completes = False
    async with httpx2.AsyncClient() as http:
        body = {"model": MODEL, "messages": ASK, "stream": stream}
        answer = await http.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == (200 if stream else 500)
    last = answer.text.strip().split("\n\n")[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "internal"


async def test_an_llm_that_is_not_there_is_unavailable():
    async with gateway("127.0.0.1:1") as url, httpx2.AsyncClient() as http:
        body = {"model": MODEL, "messages": ASK}
        headers = {"x-request-timeout": "5"}
        answer = await http.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "llm_unreachable"
        assert (await http.get(f"{url}/readyz")).status_code == 503
        assert (await http.get(f"{url}/healthz")).status_code == 200


async def test_readiness_follows_the_llm(url, llm):
    async with httpx2.AsyncClient() as http:
        assert (await http.get(f"{url}/readyz")).json() == {"status": "ready"}
        llm.serving = False
        answer = await http.get(f"{url}/readyz")
        assert answer.status_code == 503
        assert answer.json()["reason"] == "the llm is not ready"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/playground/nothing.js", 404),
        ("POST", "/", 405),
    ],
)
async def test_what_is_not_there_is_refused_in_openais_form(url, method, path, status):
    async with httpx2.AsyncClient() as http:
        answer = await http.request(method, f"{url}{path}")
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


# --- what comes in -----------------------------------------------------------------------------------------


async def test_a_body_that_says_it_is_too_long_is_refused_before_it_is_read(llm):
    async with gateway(llm.address, max_body_bytes=2000) as url, httpx2.AsyncClient() as http:

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(4):
                yield b" " * 1000

        headers = {"content-type": "application/json"}
        said = await http.post(f"{url}/v1/chat/completions", content=b" " * 2001, headers=headers)
        unsaid = await http.post(f"{url}/v1/chat/completions", content=chunks(), headers=headers)
    for answer in (said, unsaid):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert not llm.asked


async def test_a_body_that_does_not_end_is_given_up(llm):
    async with gateway(llm.address, body_timeout_ms=100) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: 100\r\n\r\n{{".encode())
        answer = await reader.read()  # to its end: the connection is closed
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_that_a_web_page_may_send_unasked_is_refused(url, llm, kind):
    body = json.dumps({"model": MODEL, "messages": ASK})
    async with httpx2.AsyncClient() as http:
        answer = await http.post(
            f"{url}/v1/chat/completions", content=body, headers={"content-type": kind} if kind else {}
        )
    assert answer.status_code == 415
    assert not llm.asked


@pytest.mark.parametrize(
    ("listen", "length", "sent"),
    [
        ("127.0.0.1:8080", f"content-length: {2**26}", b""),
        ("127.0.0.1:8080", "transfer-encoding: chunked", b"100001\r\n" + b" " * (2**20 + 1) + b"\r\n"),
        ("0.0.0.0:8080", "content-length: 100", b""),  # where all need a key, no body is a small one
    ],
)
async def test_a_stranger_is_refused_before_a_large_body_is_read(llm, listen, length, sent):
    llm.key = KEY
    async with gateway(llm.address, listen=listen, body_timeout_ms=2000) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}authorization: Bearer wrong\r\n{length}\r\n\r\n".encode() + sent)
        answer = await reader.readline()  # though the rest never comes
        writer.close()
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert not llm.asked


@pytest.mark.parametrize("size", [1000, 10**6])
async def test_of_a_request_one_copy_is_left_when_the_llm_is_asked(url, llm, monkeypatch, size):
    bodies, chats, threads, left = [], [], [], []
    read, make, ask = chat.read_chat, chat.to_request, Backend.ask

    def reads(body: bytearray) -> chat.ChatRequest:
        bodies.append(body)
        threads.append(threading.current_thread())
        made = read(body)
        chats.append(weakref.ref(made))
        return made

    def makes(*of: Any) -> llm_service_pb2.AskImageRequest:
        threads.append(threading.current_thread())
        return make(*of)

    async def asks(*of: Any) -> AsyncIterator[Any]:
        left.extend(each for each in (*bodies, *(seen() for seen in chats)) if each)
        async for event in ask(*of):
            yield event

    monkeypatch.setattr(chat, "read_chat", reads)
    monkeypatch.setattr(chat, "to_request", makes)
    monkeypatch.setattr(Backend, "ask", asks)
    turn = {
        "role": "user",
        "content": [image("data:image/png;base64," + base64.b64encode(bytes(size)).decode())],
    }
    async with httpx2.AsyncClient() as http:
        answer = await http.post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": [turn]})
    assert answer.status_code == 200
    assert len(llm.asked[0].request.messages[0].parts[0].media.image) == size
    assert not left
    beside = [thread is not threading.main_thread() for thread in threads]
    assert beside == [size > 2**18] * 2


async def test_more_requests_than_may_be_served_are_refused(llm):
    gate = asyncio.Event()

    async def pace(place: int) -> None:
        await gate.wait()

    llm.pace = pace
    async with gateway(llm.address, max_requests=1) as url, httpx2.AsyncClient() as http:
        body = {"model": MODEL, "messages": ASK}
        first = asyncio.create_task(http.post(f"{url}/v1/chat/completions", json=body))
        await llm.was_asked.wait()
        second = await http.post(f"{url}/v1/chat/completions", json=body)
        assert second.status_code == 503
        assert second.json()["error"]["code"] == "overloaded"
        gate.set()
        assert (await first).status_code == 200
        assert (await http.post(f"{url}/v1/chat/completions", json=body)).status_code == 200


async def test_more_images_than_may_come_are_refused_by_name(llm):
    async with gateway(llm.address, max_images=1) as url, httpx2.AsyncClient() as http:
        turn = {"role": "user", "content": [image(), image()]}
        answer = await http.post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": [turn]})
    assert answer.json()["error"]["param"] == "messages[0].content[1].image_url.url"


class NeverThere(Fetcher):
    """Fetches for ever."""

    async def fetch(self, url: str, field: str) -> bytes:
        return await asyncio.Event().wait()


async def test_an_image_that_does_not_come_before_the_deadline_is_given_up(llm):
    turn = {"role": "user", "content": [image("https://images.example/a.png")]}
    async with gateway(llm.address, fetcher=NeverThere()) as url, httpx2.AsyncClient() as http:
        answer = await http.post(
            f"{url}/v1/chat/completions",
            json={"model": MODEL, "messages": [turn]},
            headers={"x-request-timeout": "0.2"},
        )
    assert answer.status_code == 504
    assert llm.described == 1  # nothing is fetched for who is not known
    assert not llm.asked


async def test_nothing_is_fetched_for_a_stranger(llm):
    llm.key = KEY
    turn = {"role": "user", "content": [image("https://images.example/a.png")]}
    async with gateway(llm.address, fetcher=NeverThere()) as url, httpx2.AsyncClient() as http:
        answer = await http.post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": [turn]})
    assert answer.status_code == 401


async def test_an_image_by_url_is_refused_by_default(client, llm):
    turn = {"role": "user", "content": [image("https://images.example/a.png")]}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model=MODEL, messages=[turn])
    assert refused.value.code == "image_url_refused"
    assert refused.value.param == "messages[0].content[0].image_url.url"
    assert not llm.asked


# --- who asks, until when, and whether they are still there ------------------------------------------------


async def test_the_key_goes_on_to_the_llm_and_nothing_else_of_the_headers_does(url, llm, caplog):
    caplog.set_level(logging.DEBUG)
    headers = {
        "authorization": f"Bearer {KEY}",
        "x-hiprune-tenant": "somebody-else",
        "x-hiprune-peer": "a token",
        "cookie": "a=b",
    }
    async with httpx2.AsyncClient() as http:
        body = {"model": MODEL, "messages": ASK}
        answer = await http.post(f"{url}/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200
    told = llm.asked[0].metadata
    assert told["authorization"] == f"Bearer {KEY}"
    assert not {"x-hiprune-tenant", "x-hiprune-peer", "cookie"} & set(told)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("hiprune")]
    assert any("/v1/chat/completions 200" in line for line in ours)
    assert not any(KEY in line or ASK[0]["content"] in line for line in ours)


async def test_a_gateway_on_the_network_serves_nobody_before_an_llm_that_takes_strangers(llm):
    body = {"model": MODEL, "messages": ASK}
    async with gateway(llm.address, listen="0.0.0.0:8080") as url, httpx2.AsyncClient() as http:
        answer = await http.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 503
        assert "strangers" in answer.json()["error"]["message"]
        assert (await http.get(f"{url}/readyz")).status_code == 503
        assert (await http.get(f"{url}/v1/models")).status_code == 503
        assert not llm.asked
        llm.key = KEY  # it has tenants now
        assert (await http.get(f"{url}/readyz")).status_code == 200
        assert (await http.post(f"{url}/v1/chat/completions", json=body)).status_code == 401
        known = {"authorization": f"Bearer {KEY}"}
        assert (await http.post(f"{url}/v1/chat/completions", json=body, headers=known)).status_code == 200
    async with (
        gateway(llm.address, listen="0.0.0.0:8080", allow_anonymous=True) as url,
        httpx2.AsyncClient() as http,
    ):
        llm.key = ""
        assert (await http.post(f"{url}/v1/chat/completions", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("stream", "headers", "expected_s"),
    [
        (False, {}, 60),
        (False, {"x-request-timeout": "5"}, 5),
        (True, {"x-request-timeout": "5"}, 5),
        (False, {"x-stainless-read-timeout": "15"}, 15),
        (True, {"x-stainless-read-timeout": "15"}, 60),
        (False, {"x-request-timeout": "1e9"}, 600),
    ],
)
async def test_the_clients_time_is_the_llms_deadline(url, llm, stream, headers, expected_s):
    async with httpx2.AsyncClient() as http:
        body = {"model": MODEL, "messages": ASK, "stream": stream}
        await http.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        refused = await http.post(
            f"{url}/v1/chat/completions", json=body, headers={"x-request-timeout": "soon"}
        )
    # what is left is told by the wall clock: a machine that is set right meanwhile is no failure
    assert expected_s / 2 < llm.asked[0].seconds < expected_s * 2
    assert refused.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_llms_work(url, llm, stream):
    waits = asyncio.Event()

    async def pace(place: int) -> None:
        if place == 1:
            waits.set()
            await asyncio.Event().wait()

    llm.pace = pace
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:

        async def ask() -> None:
            answer = await client.chat.completions.create(model=MODEL, messages=ASK, stream=stream)
            if stream:
                async for _ in answer:
                    pass

        asking = asyncio.create_task(ask())
        await waits.wait()
        asking.cancel()
        async with asyncio.timeout(5):
            await llm.asked[0].ended.wait()
        # and its place is free
        llm.pace = None
        answer = await client.chat.completions.create(model=MODEL, messages=ASK)
        assert answer.choices[0].message.content == "a red circle"


async def test_closing_a_stream_ends_the_llms_work(client, llm):
    async def pace(place: int) -> None:
        if place == 1:
            await asyncio.Event().wait()

    llm.pace = pace
    stream = await client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    async with asyncio.timeout(5):
        await llm.asked[0].ended.wait()


async def test_a_trace_goes_on_through_the_gateway(url, llm):
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    async with httpx2.AsyncClient() as http:
        body = {"model": MODEL, "messages": ASK}
        await http.post(f"{url}/v1/chat/completions", json=body, headers=headers)
    assert llm.asked[0].metadata["traceparent"].split("-")[1] == trace


# --- what it says of itself --------------------------------------------------------------------------------


async def test_the_description_of_the_api_has_all_that_it_refers_to(url):
    async with httpx2.AsyncClient() as http:
        described = (await http.get(f"{url}/openapi.json")).json()
    assert set(described["paths"]) == {
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/healthz",
        "/readyz",
    }
    text = json.dumps(described)
    assert all(
        "422" not in each["responses"] for path in described["paths"].values() for each in path.values()
    )
    named = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert named <= set(described["components"]["schemas"])
    assert "pruning" in described["components"]["schemas"]["ChatRequest"]["properties"]
