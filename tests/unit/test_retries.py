"""What is tried again, how often, and where: real servers that are away, over real gRPC."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from hiprune.calls import Peer, connect
from hiprune.client import Client
from hiprune.config import ServiceSettings
from hiprune.errors import Exhausted, HipruneError, Unavailable
from hiprune.server import RequestGate
from hiprune.v1 import encoder_service_pb2 as pb
from hiprune.v1 import encoder_service_pb2_grpc, llm_service_pb2, llm_service_pb2_grpc
from hiprune.v1.media_pb2 import Media

PHOTO = bytes(2**20)
"""Larger than what gRPC by itself keeps for another attempt."""


class Away(encoder_service_pb2_grpc.EncoderServiceServicer, llm_service_pb2_grpc.ImageQaServiceServicer):
    """Answers from a call on, or after an event that it sends before it goes."""

    def __init__(self, back_at: int, error: HipruneError | None = None, *, says: bool = False) -> None:
        self.calls = 0
        self._back_at = back_at
        self._error = error or Unavailable("away")
        self._says = says

    def _come(self) -> None:
        self.calls += 1
        if self.calls < self._back_at:
            raise self._error

    async def EncodeImage(self, request, context):
        self._come()
        return pb.EncodeImageResponse()

    async def AskImage(self, request, context):
        if self._says:
            yield llm_service_pb2.AskImageResponse(delta=llm_service_pb2.TextDelta(text="well"))
        self._come()
        yield llm_service_pb2.AskImageResponse(delta=llm_service_pb2.TextDelta(text=", yes"))


class Between(encoder_service_pb2_grpc.EncoderServiceServicer):
    """A service that passes on what another answers, as the pruner does."""

    def __init__(self, behind: Peer) -> None:
        self.calls = 0
        self._behind = behind

    async def EncodeImage(self, request, context):
        self.calls += 1
        return await self._behind.call(lambda stub: stub.EncodeImage, request, pb.EncodeImageResponse)


@pytest.fixture
async def start(tmp_path):
    servers = []

    async def begin(servicer, address: str = "127.0.0.1:0") -> str:
        gate = RequestGate(30)
        gate.open()
        server = grpc.aio.server(interceptors=[gate])
        servers.append(server)
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server)
        if isinstance(servicer, Away):
            llm_service_pb2_grpc.add_ImageQaServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port(address)
        await server.start()
        return address if address.startswith("unix:") else f"127.0.0.1:{port}"

    yield begin
    await asyncio.gather(*(server.stop(None) for server in servers))


def peer(address: str) -> Peer:
    return Peer("encoder", address, encoder_service_pb2_grpc.EncoderServiceStub, ServiceSettings())


async def encode(address: str) -> grpc.StatusCode:
    async with connect(address) as channel:
        call = encoder_service_pb2_grpc.EncoderServiceStub(channel).EncodeImage(
            pb.EncodeImageRequest(media=Media(image=PHOTO)), timeout=20
        )
        return await call.code()


async def test_a_photo_is_asked_about_again_of_a_server_that_is_away_for_two_calls(start):
    server = Away(3)
    assert await encode(await start(server)) is grpc.StatusCode.OK
    assert server.calls == 3


async def test_what_is_not_unavailable_is_not_tried_again(start):
    server = Away(9, Exhausted("full"))
    assert await encode(await start(server)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.calls == 1


async def test_a_question_about_a_photo_is_asked_again_before_its_first_event(start):
    server = Away(3)
    async with Client(await start(server), timeout_s=20) as client:
        assert (await client.ask("a dog?", PHOTO)).text == ", yes"
    assert server.calls == 3


async def test_a_question_is_not_asked_again_behind_its_first_event(start):
    server = Away(2, says=True)
    heard = []
    async with Client(await start(server), timeout_s=20) as client:
        with pytest.raises(Unavailable):
            await client.ask("a dog?", PHOTO, on_delta=heard.append)
    assert (server.calls, heard) == (1, ["well"])


@pytest.mark.parametrize("behind_a_socket", [False, True])
async def test_attempts_do_not_multiply_over_hops(start, tmp_path, behind_a_socket):
    """Three at the hop that may have replicas to try; behind a socket there is one process, asked once."""
    last = Away(99)
    behind = peer(await start(last, f"unix:{tmp_path}/s" if behind_a_socket else "127.0.0.1:0"))
    between = Between(behind)
    front = peer(await start(between))
    with pytest.raises(Unavailable, match="away"):
        await front.call(
            lambda stub: stub.EncodeImage,
            pb.EncodeImageRequest(media=Media(image=PHOTO)),
            pb.EncodeImageResponse,
        )
    assert last.calls == 3
    assert between.calls == (3 if behind_a_socket else 1)
    await front.close()
    await behind.close()


async def test_that_an_answer_is_the_last_one_is_passed_on_through_a_socket(start, tmp_path):
    last = Away(99)
    far = peer(await start(last))
    near = peer(await start(Between(far), f"unix:{tmp_path}/s"))
    front = peer(await start(Between(near)))
    with pytest.raises(Unavailable, match="away"):
        await front.call(lambda stub: stub.EncodeImage, pb.EncodeImageRequest(), pb.EncodeImageResponse)
    assert last.calls == 3
    for each in (far, near, front):
        await each.close()
