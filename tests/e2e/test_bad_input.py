"""Bad input through the front door: each case's status, reason and field; the services live on."""

from __future__ import annotations

import asyncio
import io
import math
import signal
import struct
import time
import zlib

import grpc
import pytest
from PIL import Image

from hiprune.client import Client, question_message
from hiprune.errors import HipruneError, Unavailable
from hiprune.stack import Stack
from hiprune.v1 import llm_service_pb2, llm_service_pb2_grpc, media_pb2, pruner_service_pb2
from tests.stacks import picture, questions

Policy = pruner_service_pb2.PrunePolicy
Sampling = llm_service_pb2.Sampling
Message = llm_service_pb2.Message
Part = llm_service_pb2.Part
USER = llm_service_pb2.ROLE_USER
ASSISTANT = llm_service_pb2.ROLE_ASSISTANT
IMAGE = "messages[0].parts[0].media.image"


def ask_about(image: bytes, text: str = "count the shapes ."):
    return {"messages": [question_message(text, [image])]}


def with_policy(**fields):
    return {**ask_about(picture("scene00.png")), "policy": Policy(**fields)}


def with_sampling(**fields):
    return {**ask_about(picture("scene00.png")), "sampling": Sampling(**fields)}


def turns(*messages):
    return {"messages": list(messages)}


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels: a bomb."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def encoded_as(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, kind)
    return file.getvalue()


HELLO = Part(text="hello")
INVALID = ("INVALID_ARGUMENT", "INVALID_FIELD")
CASES = {
    # images
    "not an image": (ask_about(b"hello, I am text"), "INVALID_ARGUMENT", "IMAGE_UNREADABLE", IMAGE),
    "another format": (ask_about(encoded_as("BMP")), "INVALID_ARGUMENT", "IMAGE_UNREADABLE", IMAGE),
    "truncated": (ask_about(picture("scene00.png")[:5000]), "INVALID_ARGUMENT", "IMAGE_UNREADABLE", IMAGE),
    "header only": (ask_about(picture("scene00.png")[:30]), "INVALID_ARGUMENT", "IMAGE_UNREADABLE", IMAGE),
    "bomb": (ask_about(png_header(60_000, 60_000)), "INVALID_ARGUMENT", "LIMIT_EXCEEDED", IMAGE),
    "long thin bomb": (ask_about(png_header(1_000_000, 1)), "INVALID_ARGUMENT", "LIMIT_EXCEEDED", IMAGE),
    "a needle": (ask_about(png_header(16_384, 1)), "INVALID_ARGUMENT", "LIMIT_EXCEEDED", IMAGE),
    "empty image": (ask_about(b""), "INVALID_ARGUMENT", "MISSING_FIELD", IMAGE),
    "too many bytes": (
        ask_about(b"\x89PNG" + bytes(21 * 2**20)),
        "INVALID_ARGUMENT",
        "LIMIT_EXCEEDED",
        IMAGE,
    ),
    "empty media": (
        turns(Message(role=USER, parts=[Part(media=media_pb2.Media())])),
        "INVALID_ARGUMENT",
        "MISSING_FIELD",
        "messages[0].parts[0].media",
    ),
    "video for an image model": (
        turns(
            Message(
                role=USER,
                parts=[Part(media=media_pb2.Media(video=media_pb2.Video(frames=[picture("scene00.png")])))],
            )
        ),
        "UNIMPLEMENTED",
        "UNSUPPORTED",
        "messages[0].parts[0].media.video",
    ),
    "video without frames": (
        turns(Message(role=USER, parts=[Part(media=media_pb2.Media(video=media_pb2.Video()))])),
        "UNIMPLEMENTED",
        "UNSUPPORTED",
        "messages[0].parts[0].media.video",
    ),
    # the policy
    "0 tokens": (with_policy(keep_count=0), *INVALID, "policy.keep_count"),
    "negative budget": (with_policy(keep_count=-5), *INVALID, "policy.keep_count"),
    "ratio 0": (with_policy(keep_ratio=0), *INVALID, "policy.keep_ratio"),
    "ratio above 1": (with_policy(keep_ratio=1.5), *INVALID, "policy.keep_ratio"),
    "ratio NaN": (with_policy(keep_ratio=math.nan), *INVALID, "policy.keep_ratio"),
    "alpha 2": (with_policy(alpha=2), *INVALID, "policy.alpha"),
    "alpha NaN": (with_policy(alpha=math.nan), *INVALID, "policy.alpha"),
    "beta below 0": (with_policy(beta=-0.1), *INVALID, "policy.beta"),
    "unknown method": (with_policy(method=99), *INVALID, "policy.method"),
    "unknown buffer": (with_policy(buffer=77), *INVALID, "policy.buffer"),
    "unknown text budget": (with_policy(text_budget=7), *INVALID, "policy.text_budget"),
    "layer 0": (with_policy(object_layer=0), *INVALID, "policy.object_layer"),
    "layer behind the features": (with_policy(object_layer=12), *INVALID, "policy.object_layer"),
    # sampling
    "max_tokens 0": (with_sampling(max_tokens=0), *INVALID, "sampling.max_tokens"),
    "max_tokens beyond": (
        with_sampling(max_tokens=10**6),
        "INVALID_ARGUMENT",
        "LIMIT_EXCEEDED",
        "sampling.max_tokens",
    ),
    "temperature below 0": (with_sampling(temperature=-1), *INVALID, "sampling.temperature"),
    "temperature NaN": (with_sampling(temperature=math.nan), *INVALID, "sampling.temperature"),
    "top_p 0": (with_sampling(top_p=0), *INVALID, "sampling.top_p"),
    "empty stop string": (with_sampling(stop=[""]), *INVALID, "sampling.stop[0]"),
    "too many stop strings": (
        with_sampling(stop=["a"] * 9),
        "INVALID_ARGUMENT",
        "LIMIT_EXCEEDED",
        "sampling.stop",
    ),
    # messages
    "no messages": (turns(), "INVALID_ARGUMENT", None, "messages"),
    "no role": (
        turns(Message(parts=[HELLO])),
        "INVALID_ARGUMENT",
        "MISSING_FIELD",
        "messages[0].role",
    ),
    "unknown role": (turns(Message(role=9, parts=[HELLO])), *INVALID, "messages[0].role"),
    "no parts": (turns(Message(role=USER)), "INVALID_ARGUMENT", None, "messages[0].parts"),
    "empty part": (
        turns(Message(role=USER, parts=[Part()])),
        "INVALID_ARGUMENT",
        None,
        "messages[0].parts[0]",
    ),
    "the model speaks last": (
        turns(Message(role=USER, parts=[HELLO]), Message(role=ASSISTANT, parts=[HELLO])),
        *INVALID,
        "messages[1].role",
    ),
    "the model sends an image": (
        turns(
            Message(role=USER, parts=[HELLO]),
            Message(role=ASSISTANT, parts=[Part(media=media_pb2.Media(image=picture("scene00.png")))]),
            Message(role=USER, parts=[HELLO]),
        ),
        *INVALID,
        "messages[1].parts[0].media",
    ),
    "pruned media at the front door": (
        turns(Message(role=USER, parts=[Part(pruned_media=pruner_service_pb2.PrunedMedia())])),
        *INVALID,
        "messages[0].parts[0].pruned_media",
    ),
    "an image token in the text": (
        ask_about(picture("scene00.png"), "what is <image> ?"),
        "INVALID_ARGUMENT",
        "RESERVED_TOKEN",
        "messages[0].parts[1].text",
    ),
    "huge text": (
        ask_about(picture("scene00.png"), "shape " * 10_000),
        "INVALID_ARGUMENT",
        "LIMIT_EXCEEDED",
        "messages[0].parts[1].text",
    ),
    "longer than the context": (
        ask_about(picture("scene00.png"), "shape " * 2100),
        "INVALID_ARGUMENT",
        None,
        "messages",
    ),
    "unknown model": (
        {**ask_about(picture("scene00.png")), "model": "gpt-17"},
        "NOT_FOUND",
        "UNKNOWN_MODEL",
        "model",
    ),
}


async def fails(client: Client, request: llm_service_pb2.AskImageRequest) -> HipruneError:
    with pytest.raises(HipruneError) as raised:
        async for _ in client.ask_stream(request):
            pass
    return raised.value


@pytest.mark.parametrize("case", CASES)
async def test_bad_input_gets_a_clear_error(client, case):
    fields, code, reason, field = CASES[case]
    error = await fails(client, llm_service_pb2.AskImageRequest(**fields))
    assert (error.code.name, error.field) == (code, field)
    if reason is not None:
        assert error.reason == reason
    assert error.message
    assert "Traceback" not in error.message


async def test_the_services_live_on_after_all_of_it(client):
    await asyncio.gather(
        *(fails(client, llm_service_pb2.AskImageRequest(**fields)) for fields, *_ in CASES.values())
    )
    sample = questions()[0]
    answer = await client.ask(sample["question"], picture(sample["image"]))
    assert answer.text.strip() == sample["unpruned_answer"]


async def test_an_oversized_message_is_refused_by_its_bound(client):
    error = await fails(client, llm_service_pb2.AskImageRequest(**ask_about(bytes(257 * 2**20))))
    assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_request_that_is_no_message_is_refused(stack):
    async with grpc.aio.insecure_channel(stack.address) as channel:
        call = channel.unary_stream("/hiprune.v1.ImageQaService/AskImage")(b"\xff\xff\xff\xff", timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in call:
                pass
    assert raised.value.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT}


async def test_a_deadline_that_passes_is_said_so_in_time(stack):
    async with grpc.aio.insecure_channel(stack.address) as channel:
        stub = llm_service_pb2_grpc.ImageQaServiceStub(channel)
        request = llm_service_pb2.AskImageRequest(**ask_about(picture("scene06.png")))
        begun = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stub.AskImage(request, timeout=0.001):
                pass
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - begun < 5


async def test_a_dead_encoder_is_unavailable_and_its_return_heals_all():
    sample = questions()[0]
    with Stack() as stack:
        async with Client(stack.address, timeout_s=20) as client:
            first = await client.ask(sample["question"], picture(sample["image"]))
            stack.end("encoder", signal.SIGKILL)
            healed = ""
            cached = await client.ask(sample["question"], picture(sample["image"]))
            assert cached.text == first.text  # the cache needs no encoder
            error = await fails(client, llm_service_pb2.AskImageRequest(**ask_about(picture("scene09.png"))))
            assert (error.code.name, error.reason) == ("UNAVAILABLE", "ENCODER_UNREACHABLE")
            stack.start_service("encoder")
            stack.wait_ready("encoder")
            for _ in range(50):  # the pruner's channel backs off for at most two seconds
                try:
                    healed = (await client.ask("count the shapes .", picture("scene09.png"))).text
                    break
                except Unavailable:
                    await asyncio.sleep(0.1)
            assert healed
            stack.end("pruner", signal.SIGKILL)
            error = await fails(client, llm_service_pb2.AskImageRequest(**ask_about(picture("scene09.png"))))
            assert (error.code.name, error.reason) == ("UNAVAILABLE", "PRUNER_UNREACHABLE")
