"""Whatever is sent to the three running services: an answer, or an error of the caller's that says of what.

Never INTERNAL or UNKNOWN, no memory that stays, no word in the logs; and afterwards they answer as ever.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hiprune.stack import Stack
from hiprune.v1 import (
    encoder_service_pb2,
    encoder_service_pb2_grpc,
    llm_service_pb2,
    llm_service_pb2_grpc,
    media_pb2,
    pruner_service_pb2,
    pruner_service_pb2_grpc,
)
from tests.fuzz.amounts import amounts, tried_on
from tests.fuzz.memory import memory_of
from tests.fuzz.messages import broken_bytes, fields_of, messages, nearly
from tests.stacks import picture

SERVICES = ("encoder", "pruner", "llm")
THEIRS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""What a caller may be told. Not RESOURCE_EXHAUSTED: requests come one at a time, and none is large."""
ABOUT_THE_WHOLE = re.compile(r"^(\d+ bytes (that are no message|of request)|more than \d+ fields)")
PRIVATE = re.compile(r"Traceback|object at 0x|site-packages|\.py\b|/tmp/|/root/|/home/|\b[A-Z]\w+Error\b")
TWO_TOKENS = llm_service_pb2.Sampling(max_tokens=2)


@dataclass
class House:
    """The three services, and right requests to each."""

    stack: Stack

    @cached_property
    def channels(self) -> dict[str, grpc.Channel]:
        addresses = {
            "encoder": self.stack.encoder_address,
            "pruner": self.stack.pruner_address,
            "llm": self.stack.address,
        }
        return {name: grpc.insecure_channel(address) for name, address in addresses.items()}

    @cached_property
    def encode(self) -> list[encoder_service_pb2.EncodeImageRequest]:
        media = media_pb2.Media(image=picture("scene03.png"))
        return [
            encoder_service_pb2.EncodeImageRequest(media=media, layers=layers, aligned=aligned)
            for layers, aligned in (([4, 7], True), ([], False))
        ]

    @cached_property
    def prune(self) -> list[pruner_service_pb2.PruneImageRequest]:
        media = media_pb2.Media(image=picture("scene03.png"))
        return [
            pruner_service_pb2.PruneImageRequest(media=media, policy=policy, question="what is blue ?")
            for policy in self.policies
        ]

    @cached_property
    def policies(self) -> list[pruner_service_pb2.PrunePolicy]:
        Policy = pruner_service_pb2.PrunePolicy
        return [
            Policy(),
            Policy(method=pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS, keep_count=40, include_scores=True),
            Policy(method=pruner_service_pb2.METHOD_RANDOM, keep_ratio=0.1),
        ]

    @cached_property
    def tokens(self) -> list[pruner_service_pb2.PruneTokensRequest]:
        encoder = encoder_service_pb2_grpc.EncoderServiceStub(self.channels["encoder"])
        answer = encoder.EncodeImage(self.encode[0], timeout=60)
        requests = []
        for policy in self.policies:
            request = pruner_service_pb2.PruneTokensRequest(
                views=answer.views, policy=policy, vision_digest=answer.fingerprint.vision_digest
            )
            requests.append(request)
        requests[0].text_vector.CopyFrom(answer.views[0].attention[0].scores)
        requests[1].question = "what is blue ?"
        requests[2].similarity.views.add().CopyFrom(answer.views[0].attention[0].scores)
        return requests

    @cached_property
    def generate(self) -> list[llm_service_pb2.GenerateTextRequest]:
        pruner = pruner_service_pb2_grpc.PrunerServiceStub(self.channels["pruner"])
        requests = []
        for request in self.prune:
            part = llm_service_pb2.Part(pruned_media=pruner.PruneImage(request, timeout=60).media)
            said = [part, llm_service_pb2.Part(text="count the shapes .")]
            requests.append(llm_service_pb2.GenerateTextRequest(messages=_turns(said), sampling=TWO_TOKENS))
        return requests

    @cached_property
    def ask(self) -> list[llm_service_pb2.AskImageRequest]:
        part = llm_service_pb2.Part(media=media_pb2.Media(image=picture("scene03.png")))
        said = [part, llm_service_pb2.Part(text="count the shapes .")]
        return [
            llm_service_pb2.AskImageRequest(messages=_turns(said), policy=policy, sampling=TWO_TOKENS)
            for policy in self.policies
        ]

    def works(self) -> None:
        """Every service is ready, and the whole of them answers as it did."""
        for name, channel in self.channels.items():
            health = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(service=""), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
        stub = llm_service_pb2_grpc.ImageQaServiceStub(self.channels["llm"])
        said = "".join(event.delta.text for event in stub.AskImage(self.ask[0], timeout=60))
        assert said == self.answer

    @cached_property
    def answer(self) -> str:
        stub = llm_service_pb2_grpc.ImageQaServiceStub(self.channels["llm"])
        text = "".join(event.delta.text for event in stub.AskImage(self.ask[0], timeout=60))
        assert text
        return text

    def send(self, service: str, method: str, request: bytes) -> tuple[grpc.StatusCode, str, str, str]:
        """A request of any bytes: the status, its message, reason and field."""
        channel = self.channels[service]
        try:
            if method.endswith(("AskImage", "GenerateText")):
                for _ in channel.unary_stream(method)(request, timeout=60):
                    pass
            else:
                channel.unary_unary(method)(request, timeout=60)
        except grpc.RpcError as error:
            return (error.code(), error.details() or "", *_details(error))
        return grpc.StatusCode.OK, "", "", ""


def _turns(parts: list[llm_service_pb2.Part]) -> list[llm_service_pb2.Message]:
    text = [llm_service_pb2.Part(text="is there a red square ?")]
    return [
        llm_service_pb2.Message(role=llm_service_pb2.ROLE_USER, parts=parts),
        llm_service_pb2.Message(role=llm_service_pb2.ROLE_ASSISTANT, parts=text),
        llm_service_pb2.Message(role=llm_service_pb2.ROLE_USER, parts=text),
    ]


def _details(error: Any) -> tuple[str, str]:
    """The reason and the field of an error."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                    info = error_details_pb2.ErrorInfo.FromString(detail.value)
                    return info.reason, info.metadata.get("field", "")
    return "", ""


@pytest.fixture(scope="module")
def house(stack: Stack) -> Iterator[House]:
    house = House(stack)
    assert house.answer
    yield house
    for channel in house.channels.values():
        channel.close()


@contextlib.contextmanager
def unshaken(house: House) -> Iterator[None]:
    """What holds around any number of requests, whatever they were."""
    begun = {name: len(house.stack.log_of(name)) for name in SERVICES}
    with contextlib.ExitStack() as watching:
        taken = {
            name: watching.enter_context(memory_of(house.stack.processes[name].pid)) for name in SERVICES
        }
        yield
    for name in SERVICES:
        assert house.stack.processes[name].poll() is None, f"the {name} ended"
        said = house.stack.log_of(name)[begun[name] :].splitlines()
        # each request has its line, and nothing else is worth one
        assert [line for line in said if " INFO " not in line or " hiprune.access: " not in line] == [], name
        assert taken[name].grew < 400 * 2**20, f"the {name}"
        assert taken[name].kept < 200 * 2**20, f"the {name}"
    house.works()


def claim_of(house: House, service: str, method: str, kind: type[Message], request: bytes) -> None:
    """One request's answer is one that a caller can do something with."""
    code, message, reason, field = house.send(service, method, request)
    assert code in THEIRS, (code, message)
    if code == grpc.StatusCode.OK:
        return
    assert reason, message
    assert message
    assert not PRIVATE.search(message), message
    if not ABOUT_THE_WHOLE.match(message):
        assert fields_of(kind.DESCRIPTOR, field), (field, message)


METHODS = {
    "EncodeImage": ("encoder", "EncoderService", encoder_service_pb2.EncodeImageRequest, "encode"),
    "PruneImage": ("pruner", "PrunerService", pruner_service_pb2.PruneImageRequest, "prune"),
    "PruneTokens": ("pruner", "PrunerService", pruner_service_pb2.PruneTokensRequest, "tokens"),
    "GenerateText": ("llm", "LanguageModelService", llm_service_pb2.GenerateTextRequest, "generate"),
    "AskImage": ("llm", "ImageQaService", llm_service_pb2.AskImageRequest, "ask"),
}


@amounts
@pytest.mark.parametrize("method", METHODS)
def test_any_request_is_answered_or_refused_by_name(method: str, amount: str, house: House) -> None:
    service, owner, kind, right = METHODS[method]
    path = f"/hiprune.v1.{owner}/{method}"
    requests: list[Any] = getattr(house, right)
    for request in requests:
        assert house.send(service, path, request.SerializeToString())[0] == grpc.StatusCode.OK

    with unshaken(house):

        @tried_on(method, amount)
        @given(st.one_of(nearly(requests), nearly(requests), nearly(requests), messages(kind)))
        def claim(request: Message) -> None:
            claim_of(house, service, path, kind, request.SerializeToString())

        claim()


@amounts
def test_bytes_that_are_hardly_a_request_are_refused(amount: str, house: House) -> None:
    with unshaken(house):

        @tried_on("bytes instead of requests", amount)
        @given(st.sampled_from(sorted(METHODS)), st.data())
        def claim(method: str, data: st.DataObject) -> None:
            service, owner, kind, right = METHODS[method]
            whole = data.draw(st.sampled_from(getattr(house, right))).SerializeToString()
            request = data.draw(broken_bytes(whole[:4000]) | broken_bytes(whole) | st.binary(max_size=60))
            claim_of(house, service, f"/hiprune.v1.{owner}/{method}", kind, request)

        claim()


# --- what was found, by name --------------------------------------------------------------------------


def bombs() -> dict[str, bytes]:
    """Small files that claim 268 million pixels or more."""
    rgb = Image.new("RGB", (16, 16), "red")
    files = {}
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        buffer = io.BytesIO()
        options: dict[str, Any] = {"icc_profile": b"p"} if form == "WEBP" else {}
        rgb.save(buffer, form, **options)
        files[form] = bytearray(buffer.getvalue())
    png = files["PNG"]
    png[16:24] = struct.pack(">II", 60_000, 60_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    frame = files["JPEG"].index(b"\xff\xc0") + 5
    files["JPEG"][frame : frame + 4] = struct.pack(">HH", 65_500, 65_500)
    files["WEBP"][24:30] = (16_383).to_bytes(3, "little") * 2
    files["GIF"][6:10] = struct.pack("<HH", 65_535, 65_535)
    return {form: bytes(data) for form, data in files.items()}


@pytest.mark.parametrize("form", bombs())
def test_a_bomb_dies_in_its_header_and_takes_no_memory(form: str, house: House) -> None:
    media = media_pb2.Media(image=bombs()[form])
    request = encoder_service_pb2.EncodeImageRequest(media=media, layers=[4])
    with memory_of(house.stack.processes["encoder"].pid) as memory:
        code, message, reason, field = house.send(
            "encoder", "/hiprune.v1.EncoderService/EncodeImage", request.SerializeToString()
        )
    assert (code, reason, field) == (grpc.StatusCode.INVALID_ARGUMENT, "LIMIT_EXCEEDED", "media.image")
    assert "pixels" in message
    assert memory.grew < 20 * 2**20


@pytest.mark.parametrize("method", METHODS)
def test_a_request_of_nothing_but_empty_messages_takes_no_memory(method: str, house: House) -> None:
    service, owner, _, _ = METHODS[method]
    with unshaken(house), memory_of(house.stack.processes[service].pid) as memory:
        code, message, reason, _ = house.send(service, f"/hiprune.v1.{owner}/{method}", b"\x0a\0" * 1_900_000)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "LIMIT_EXCEEDED")
    assert "more than 100000 fields" in message
    assert memory.grew < 40 * 2**20  # 140 MB as messages


@pytest.mark.parametrize(
    ("service", "method"),
    [
        ("encoder", "EncoderService/GetEncoder"),
        ("pruner", "PrunerService/GetPruner"),
        ("llm", "LanguageModelService/GetLanguageModel"),
    ],
)
def test_a_question_without_fields_takes_no_megabyte(service: str, method: str, house: House) -> None:
    path = f"/hiprune.v1.{method}"
    assert house.send(service, path, b"")[0] == grpc.StatusCode.OK
    code, message, reason, _ = house.send(service, path, b"\xfa\x7f\x80\x80\x40" + bytes(2**20))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "LIMIT_EXCEEDED")
    assert "expected at most 65536" in message


def test_a_model_of_a_very_long_name_is_not_repeated(house: House) -> None:
    request = llm_service_pb2.AskImageRequest(messages=house.ask[0].messages, model="m" * 10**6)
    code, message, _, field = house.send(
        "llm", "/hiprune.v1.ImageQaService/AskImage", request.SerializeToString()
    )
    assert (code, field) == (grpc.StatusCode.NOT_FOUND, "model")
    assert len(message) < 300
