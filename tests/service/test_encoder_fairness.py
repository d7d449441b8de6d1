"""Claims about tenants who share an encoder: the real engine and door, and a tower that waits to be told."""

from __future__ import annotations

import asyncio
import io
import threading

import grpc
import pytest
import torch
from PIL import Image

from hiprune.auth import PEER_HEADER, TENANT_HEADER, Rules
from hiprune.door import Door
from hiprune.errors import Exhausted, from_rpc
from hiprune.server import RequestGate
from hiprune.telemetry import start_clock
from hiprune.v1 import encoder_service_pb2 as pb
from hiprune.v1 import encoder_service_pb2_grpc, media_pb2
from services.encoder.engine import VisionEngine
from services.encoder.families import EncodedView, Prepared
from services.encoder.settings import Settings

TOKEN = "one secret for all services"


class Tower:
    """One patch an image; runs a batch for each time it is let. An image's shade says whose it is."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.order: list[int] = []
        self.gate = threading.Semaphore(0)

    def patches(self, size, frames=None):
        return 1

    def prepare(self, image):
        return Prepared(torch.tensor(image.getpixel((0, 0))[0]), 1)

    def encode(self, items, layers, aligned):
        self.gate.acquire()
        self.order += [int(item.pixels) for item in items]
        return [[EncodedView(torch.zeros(1, 1), {}, (1, 1))] for _ in items]


class Encoder(encoder_service_pb2_grpc.EncoderServiceServicer):
    def __init__(self, engine: VisionEngine) -> None:
        self.engine = engine

    async def EncodeImage(self, request, context):
        await self.engine.encode(request.media, [], aligned=False, clock=start_clock())
        return pb.EncodeImageResponse()


def shade(number: int) -> media_pb2.Media:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "PNG")
    return media_pb2.Media(image=buffer.getvalue())


class House:
    def __init__(self, tower: Tower, engine: VisionEngine, channel: grpc.aio.Channel) -> None:
        self.tower = tower
        self.engine = engine
        self._stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)

    def send(self, tenant: str, number: int) -> asyncio.Task:
        metadata = ((PEER_HEADER, TOKEN), (TENANT_HEADER, tenant))
        request = pb.EncodeImageRequest(media=shade(number))
        return asyncio.ensure_future(self._stub.EncodeImage(request, metadata=metadata, timeout=30))

    async def waiting(self, count: int) -> None:
        async with asyncio.timeout(10):
            while self.engine._batcher.depth != count:  # noqa: ASYNC110  # the engine tells nobody
                await asyncio.sleep(0.005)


@pytest.fixture
async def house(serve):
    tower = Tower()
    settings = Settings(max_batch_patches=1, max_queue_patches=12, max_wait_ms=0)
    engine = VisionEngine(tower, settings)
    gate = RequestGate(30, Door(Rules(peer_token=TOKEN, peers_only=True)))
    gate.open()

    def register(server: grpc.aio.Server) -> None:
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(Encoder(engine), server)

    yield House(tower, engine, await serve(register, gate=gate))
    tower.gate.release(1000)
    await engine.close()


async def test_one_tenants_flood_leaves_another_its_turn(house):
    flood = [house.send("flood", 1)]
    await house.waiting(0)  # its first one runs
    flood += [house.send("flood", 1) for _ in range(10)]
    await house.waiting(10)
    few = [house.send("few", 2) for _ in range(2)]
    await house.waiting(12)
    house.tower.gate.release(13)
    await asyncio.gather(*flood, *few)
    assert sorted(house.tower.order) == [1] * 11 + [2] * 2
    assert 2 in house.tower.order[:3]
    assert house.tower.order[:5].count(2) == 2


async def test_a_flood_that_fills_the_queue_makes_room_for_others(house):
    flood = [house.send("flood", 1)]
    await house.waiting(0)
    flood += [house.send("flood", 1) for _ in range(12)]
    await house.waiting(12)
    refused = house.send("flood", 1)
    with pytest.raises(grpc.aio.AioRpcError) as full:
        await refused
    assert isinstance(from_rpc(full.value, peer="encoder"), Exhausted)
    few = house.send("few", 2)
    pushed_out = await next_done(flood)
    error = from_rpc(pushed_out.exception(), peer="encoder")
    assert (type(error), error.reason) == (Exhausted, "OVERLOADED")
    assert error.retry_after_s > 0
    house.tower.gate.release(13)
    await few
    done = await asyncio.gather(*flood, return_exceptions=True)
    assert sum(isinstance(each, grpc.aio.AioRpcError) for each in done) == 1


async def next_done(tasks: list[asyncio.Task]) -> asyncio.Task:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    return done.pop()
