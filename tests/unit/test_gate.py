"""What callers take from a server before they are known, and while their answers are sent: over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from hiprune import deadlines
from hiprune.auth import Rules
from hiprune.door import Door
from hiprune.errors import Exhausted, Expired, HipruneError, InvalidInput, Unauthenticated, from_rpc
from hiprune.server import Health, RequestGate
from hiprune.v1 import encoder_service_pb2 as pb
from hiprune.v1 import encoder_service_pb2_grpc
from hiprune.visitors import MAX_READING

ENCODE = "/hiprune.v1.EncoderService/EncodeImage"
CHECK = "/grpc.health.v1.Health/Check"
LARGE = 8 * 2**20


class Nobody:
    """The accounts of a house without tenants."""

    def of_key(self, key: str) -> None:
        return None

    def named(self, name: str) -> None:
        return None


class Encoder(encoder_service_pb2_grpc.EncoderServiceServicer):
    """Answers with many bytes."""

    def __init__(self) -> None:
        self.calls = 0
        self.left_s: list[float] = []

    async def EncodeImage(self, request, context):
        self.calls += 1
        self.left_s.append(deadlines.remaining_s())
        answer = pb.EncodeImageResponse()
        answer.views.add().features.data = bytes(LARGE)
        return answer

    def register(self, server):
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(self, server)


def health(server):
    health_pb2_grpc.add_HealthServicer_to_server(Health(), server)


def opened(*arguments, **bounds) -> RequestGate:
    gate = RequestGate(*(arguments or (30,)), **bounds)
    gate.open()
    return gate


@contextlib.asynccontextmanager
async def silent(channel, method: str):
    """A call whose client says what it calls and never what it asks."""
    call = channel.stream_unary(method)()
    await call.wait_for_connection()
    yield call
    call.cancel()


async def error_of(call) -> HipruneError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(10):
            await call
    return from_rpc(caught.value, peer="server")


async def until(holds) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110  # gRPC tells nobody
            await asyncio.sleep(0.005)


async def test_a_stranger_is_refused_before_the_body_is_asked_for(serve):
    channel = await serve(Encoder().register, gate=opened(30, Door(Rules(accounts=Nobody()))))
    async with silent(channel, ENCODE) as call:
        assert type(await error_of(call)) is Unauthenticated


async def test_a_body_that_does_not_come_is_waited_for_until_the_deadline(serve):
    encoder, gate = Encoder(), opened(0.2)
    channel = await serve(encoder.register, gate=gate)
    async with silent(channel, ENCODE) as call:
        assert type(await error_of(call)) is Expired
    assert gate._running == 0
    assert encoder.calls == 0


async def test_a_call_without_a_request_is_bad_input(serve):
    channel = await serve(Encoder().register)
    call = channel.stream_unary(ENCODE)()
    await call.done_writing()
    error = await error_of(call)
    assert (type(error), error.reason) == (InvalidInput, "MISSING_FIELD")


async def test_a_message_above_grpcs_bound_is_told_so(serve):
    encoder = Encoder()
    channel = await serve(encoder.register)
    error = await error_of(channel.unary_unary(ENCODE)(bytes(LARGE)))  # gRPC's default is 4 MiB
    assert (type(error), error.reason) == (Exhausted, "LIMIT_EXCEEDED")
    assert encoder.calls == 0


async def test_an_answer_that_is_not_read_is_held_by_its_request(serve):
    """gRPC takes an answer whole and sends it as the client reads: until then it is in memory, and counts."""
    encoder, gate = Encoder(), opened(30, max_requests=1)
    channel = await serve(encoder.register, health, gate=gate)
    unread = channel.unary_stream(ENCODE)(b"")
    await until(lambda: gate._intake._held > LARGE)
    error = await error_of(channel.unary_unary(ENCODE)(b""))
    assert (type(error), error.reason, error.retry_after_s) == (Exhausted, "OVERLOADED", 1)
    await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    unread.cancel()
    await until(lambda: gate._running == 0)
    assert gate._intake._held == 0
    assert encoder.calls == 1


async def test_the_deadline_ends_an_answer_that_is_not_read(serve):
    gate = opened(0.3)
    channel = await serve(Encoder().register, gate=gate)
    unread = channel.unary_stream(ENCODE)(b"")
    await until(lambda: gate._intake._held)
    await until(lambda: gate._running == 0)
    assert gate._intake._held == 0
    unread.cancel()


async def test_a_deadline_of_days_is_cut(serve):
    encoder = Encoder()
    channel = await serve(encoder.register, gate=opened(30, max_deadline_s=40))
    for timeout in (86_400, 35):
        call = channel.unary_stream(ENCODE)(b"", timeout=timeout)
        await until(lambda: encoder.left_s)
        left_s = encoder.left_s.pop()
        assert left_s <= (40 if timeout > 40 else 36)
        assert left_s > 30
        call.cancel()


# --- calls without a key --------------------------------------------------------------------------


async def test_calls_without_a_key_that_never_end_keep_no_probe_out(serve):
    channel = await serve(health)
    async with contextlib.AsyncExitStack() as stack:
        waiting = [await stack.enter_async_context(silent(channel, CHECK)) for _ in range(3 * MAX_READING)]
        stub = health_pb2_grpc.HealthStub(channel)
        for _ in range(3):
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        # who came first gave way to who came last
        for call in waiting[: 2 * MAX_READING]:
            error = await error_of(call)
            assert (type(error), error.message) == (Exhausted, "too many calls without a key at a time")
        assert not waiting[-1].done()


async def test_a_large_call_without_a_key_is_refused_and_a_broken_one_too(serve):
    channel = await serve(health)
    for body in (bytes(2**20), b"\xff\xff\xff"):
        assert type(await error_of(channel.unary_unary(CHECK)(body))) is InvalidInput


async def test_what_health_and_reflection_serve_they_serve_behind_the_gate(serve):
    def reflected(server):
        reflection.enable_server_reflection(("grpc.health.v1.Health",), server)

    channel = await serve(health, reflected)
    stub = health_pb2_grpc.HealthStub(channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.List(health_pb2.HealthListRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    asked = [reflection_pb2.ServerReflectionRequest(list_services="") for _ in range(2)]
    answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(asked))
    listed = [[each.name for each in one.list_services_response.service] async for one in answers]
    assert listed == [["grpc.health.v1.Health"]] * 2
