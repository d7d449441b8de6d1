"""The server around every service, over real gRPC: errors, readiness, deadlines, health, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hiprune import deadlines
from hiprune.calls import call, connect
from hiprune.errors import (
    Expired,
    HipruneError,
    Internal,
    InvalidInput,
    Unavailable,
    from_rpc,
)
from hiprune.server import LIVENESS, RequestGate
from hiprune.stack import free_port
from hiprune.v1 import (
    encoder_service_pb2,
    encoder_service_pb2_grpc,
    llm_service_pb2,
    llm_service_pb2_grpc,
    media_pb2,
)

GetRequest = encoder_service_pb2.GetEncoderRequest
GetResponse = encoder_service_pb2.GetEncoderResponse
AskRequest = llm_service_pb2.AskImageRequest
AskResponse = llm_service_pb2.AskImageResponse


def delta(text: str) -> AskResponse:
    return AskResponse(delta=llm_service_pb2.TextDelta(text=text))


class Unary(encoder_service_pb2_grpc.EncoderServiceServicer):
    """A unary method that does what the test says."""

    def __init__(self, behaviour) -> None:
        self.behaviour = behaviour

    async def GetEncoder(self, request, context):
        return await self.behaviour() or GetResponse()

    def register(self, server):
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(self, server)


class Stream(llm_service_pb2_grpc.ImageQaServiceServicer):
    """A streaming method that sends what the test yields, and notes when its generator was closed."""

    def __init__(self, behaviour) -> None:
        self.behaviour = behaviour
        self.sent = 0
        self.closed = asyncio.Event()

    async def AskImage(self, request, context):
        try:
            async for text in self.behaviour():
                yield delta(text)
                self.sent += 1
        finally:
            self.closed.set()

    def register(self, server):
        llm_service_pb2_grpc.add_ImageQaServiceServicer_to_server(self, server)


@pytest.fixture
def unary(serve):
    async def start(behaviour, gate=None):
        channel = await serve(Unary(behaviour).register, gate=gate)
        return encoder_service_pb2_grpc.EncoderServiceStub(channel).GetEncoder

    return start


@pytest.fixture
def stream(serve):
    async def start(behaviour, gate=None):
        servicer = Stream(behaviour)
        channel = await serve(servicer.register, gate=gate)
        return servicer, llm_service_pb2_grpc.ImageQaServiceStub(channel).AskImage

    return start


def opened(default_deadline_s: float) -> RequestGate:
    gate = RequestGate(default_deadline_s)
    gate.open()
    return gate


async def error_of(answer) -> HipruneError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return from_rpc(caught.value, peer="server")


async def texts(answers) -> list[str]:
    return [answer.delta.text async for answer in answers]


async def fail():
    raise KeyError("the secret of the house")


async def fail_in_stream() -> AsyncIterator[str]:
    yield "a"
    raise KeyError("the secret of the house")


async def sleep():
    await asyncio.sleep(20)


async def slow_stream() -> AsyncIterator[str]:
    yield "a"
    await asyncio.sleep(20)


# --- errors ---------------------------------------------------------------------------------------


async def test_an_unforeseen_error_is_internal_without_its_text_and_whole_in_the_log(unary, caplog):
    method = await unary(fail)
    with caplog.at_level(logging.ERROR, "hiprune.server"):
        error = await error_of(method(GetRequest()))
    assert (type(error), error.reason) == (Internal, "INTERNAL")
    assert "secret" not in str(error)
    assert "the secret of the house" in caplog.text


async def test_an_unforeseen_error_in_a_stream_is_internal_behind_what_was_sent(stream, caplog):
    servicer, method = await stream(fail_in_stream)
    answers = method(AskRequest())
    assert (await answers.read()).delta.text == "a"
    with caplog.at_level(logging.ERROR, "hiprune.server"):
        error = await error_of(answers.read())
    assert (type(error), error.reason) == (Internal, "INTERNAL")
    assert "secret" not in str(error)
    assert "the secret of the house" in caplog.text
    assert servicer.closed.is_set()


async def test_a_domain_error_in_a_stream_keeps_its_reason_and_field(stream):
    async def refuse() -> AsyncIterator[str]:
        raise InvalidInput("it is 7", field="policy.alpha")
        yield "never"

    _, method = await stream(refuse)
    error = await error_of(texts(method(AskRequest())))
    assert (type(error), error.field) == (InvalidInput, "policy.alpha")


async def test_an_error_that_is_its_own_cause_ends_its_request(unary):
    async def refuse():
        error = Unavailable("away")
        raise error.under("media") from error

    method = await unary(refuse)
    assert type(await error_of(method(GetRequest(), timeout=5))) is Unavailable


async def test_a_timeout_of_somebody_elses_is_not_called_the_deadlines(unary, stream, caplog):
    async def fail_to_connect():
        raise TimeoutError("[Errno 110] Connection timed out")

    async def fail_in_stream_to_connect() -> AsyncIterator[str]:
        raise TimeoutError("[Errno 110] Connection timed out")
        yield "never"

    method = await unary(fail_to_connect)
    assert type(await error_of(method(GetRequest()))) is Internal
    _, method = await stream(fail_in_stream_to_connect)
    assert type(await error_of(texts(method(AskRequest())))) is Internal


@pytest.mark.parametrize("how", ["unary", "stream"])
async def test_bytes_that_are_no_message_are_bad_input(how, serve):
    channel = await serve(Unary(sleep).register, Stream(slow_stream).register)
    if how == "unary":
        answer = channel.unary_unary("/hiprune.v1.EncoderService/GetEncoder")(b"\xff\xff\xff")
    else:
        answer = channel.unary_stream("/hiprune.v1.ImageQaService/AskImage")(b"\xff\xff\xff").read()
    error = await error_of(answer)
    assert (type(error), error.reason) == (InvalidInput, "INVALID_FIELD")


# --- readiness ------------------------------------------------------------------------------------


async def test_before_it_is_ready_a_service_says_so_and_when_to_come_back(unary, stream):
    gate = RequestGate(30)

    async def answer():
        return GetResponse()

    method = await unary(answer, gate)
    _, ask = await stream(slow_stream, gate)
    for response in (method(GetRequest()), texts(ask(AskRequest()))):
        error = await error_of(response)
        assert (type(error), error.reason, error.retry_after_s) == (Unavailable, "NOT_READY", 1)
    gate.open()
    assert await method(GetRequest()) == GetResponse()


# --- deadlines ------------------------------------------------------------------------------------


async def test_the_default_deadline_ends_a_unary_call_that_brings_none(unary):
    method = await unary(sleep, opened(0.2))
    begun = time.monotonic()
    error = await error_of(method(GetRequest()))
    assert (type(error), error.reason) == (Expired, "DEADLINE_EXCEEDED")
    assert 0.15 < time.monotonic() - begun < 5


async def test_the_default_deadline_ends_a_stream_that_brings_none(stream):
    servicer, method = await stream(slow_stream, opened(0.2))
    answers = method(AskRequest())
    assert (await answers.read()).delta.text == "a"
    assert type(await error_of(answers.read())) is Expired
    assert servicer.closed.is_set()


async def test_the_deadline_ends_a_stream_whose_client_does_not_read(stream):
    async def flood() -> AsyncIterator[str]:
        while True:
            yield "x" * 100_000

    servicer, method = await stream(flood, opened(0.5))
    answers = method(AskRequest())
    await asyncio.wait_for(servicer.closed.wait(), 10)  # its slot is free, the client still silent
    async with asyncio.timeout(10):
        error = await error_of(texts(answers))
    assert type(error) is Expired


async def test_a_clients_deadline_is_what_the_service_sees_and_the_next_hop_gets_less(unary):
    seen = []

    async def note():
        seen.append((deadlines.remaining_s(), deadlines.for_next_hop(60)))

    method = await unary(note, opened(30))
    await method(GetRequest(), timeout=5)
    await method(GetRequest(), timeout=100)
    await method(GetRequest())
    (five, next_five), (hundred, next_hundred), (none, next_none) = seen
    assert 4 < five < 5.1
    assert 0 < five - next_five < 2 * deadlines.HOP_MARGIN_S
    assert 90 < hundred < 102  # longer than the default: the client's own holds (gRPC rounds it up)
    assert 0 < hundred - next_hundred < 2 * deadlines.HOP_MARGIN_S
    assert 29 < none < 30.1
    assert 0 < none - next_none < 2 * deadlines.HOP_MARGIN_S


async def test_one_requests_deadline_is_not_anothers(unary):
    seen = {}

    async def note():
        name = round(deadlines.remaining_s())
        await asyncio.sleep(0.1)
        seen[name] = round(deadlines.remaining_s() + 0.1)

    method = await unary(note)
    await asyncio.gather(*(method(GetRequest(), timeout=seconds) for seconds in (10, 20, 25)))
    assert seen == {10: 10, 20: 20, 25: 25}
    assert deadlines.remaining_s() is None


async def test_a_hop_is_not_begun_with_nothing_left(unary):
    async def dawdle():
        await asyncio.sleep(deadlines.remaining_s() - deadlines.HOP_MARGIN_S)
        deadlines.for_next_hop(60)

    method = await unary(dawdle, opened(0.2))
    error = await error_of(method(GetRequest()))
    assert type(error) is Expired
    assert "too little for another hop" in str(error)


# --- clients that leave ---------------------------------------------------------------------------


async def test_the_generator_is_closed_when_the_client_cancels(stream):
    servicer, method = await stream(slow_stream)
    answers = method(AskRequest())
    assert (await answers.read()).delta.text == "a"
    assert not servicer.closed.is_set()
    answers.cancel()
    await asyncio.wait_for(servicer.closed.wait(), 5)


async def test_the_generator_is_closed_when_the_client_leaves_in_the_middle_of_a_write(stream):
    async def flood() -> AsyncIterator[str]:
        while True:
            yield "x" * 100_000

    servicer, method = await stream(flood)
    answers = method(AskRequest())
    before = -1
    while before != servicer.sent:  # until the client's window is full
        before = servicer.sent
        await asyncio.sleep(0.2)
    assert before > 0
    answers.cancel()
    await asyncio.wait_for(servicer.closed.wait(), 5)


async def test_work_is_cancelled_when_the_client_cancels_a_unary_call(unary):
    cancelled = asyncio.Event()
    begun = asyncio.Event()

    async def work():
        begun.set()
        try:
            await asyncio.sleep(20)
        finally:
            cancelled.set()

    method = await unary(work)
    answer = method(GetRequest())
    await asyncio.wait_for(begun.wait(), 5)
    answer.cancel()
    await asyncio.wait_for(cancelled.wait(), 5)


# --- the process ----------------------------------------------------------------------------------

PROGRAM = """
import asyncio, sys, time
from hiprune.config import ServiceSettings
from hiprune.server import main
from hiprune.v1 import encoder_service_pb2 as pb, encoder_service_pb2_grpc


class Sleeper(encoder_service_pb2_grpc.EncoderServiceServicer):
    names = ("hiprune.v1.EncoderService",)

    def __init__(self, settings):
        self.broken = asyncio.Event()

    def register(self, server):
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(self, server)

    async def start(self):
        print("starting", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

    async def stop(self):
        print("stopped", flush=True)

    async def failed(self):
        await self.broken.wait()
        return "it broke"

    def request_bytes(self):
        return {}

    async def GetEncoder(self, request, context):
        return pb.GetEncoderResponse()

    async def EncodeImage(self, request, context):
        print("encoding", flush=True)
        if request.media.image == b"break":
            self.broken.set()
            await asyncio.sleep(30)
        await asyncio.sleep(float(request.media.image))
        return pb.EncodeImageResponse(fingerprint=pb.ModelFingerprint(family="slept"))


main(ServiceSettings, Sleeper)
"""


class Process:
    """The program above: ready once told to go on."""

    def __init__(self, folder: Path, *arguments: str, umask: int = 0o022) -> None:
        self.address = f"unix:{folder}/server.sock"
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, f"--listen={self.address}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            umask=umask,
            env={**os.environ, "HIPRUNE_LOG_LEVEL": "warning"},
        )

    async def says(self, line: str) -> None:
        assert (await asyncio.to_thread(self.popen.stdout.readline)).strip() == line

    def go_on(self) -> None:
        self.popen.stdin.write("go on\n")
        self.popen.stdin.flush()

    async def end(self) -> int:
        return await asyncio.to_thread(self.popen.wait, 20)


@pytest.fixture
def process(tmp_path):
    started = []

    def start(*arguments: str, **options: object) -> Process:
        started.append(Process(tmp_path, *arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.popen.kill()
        each.popen.communicate()


async def statuses(channel) -> dict[str, str]:
    stub = health_pb2_grpc.HealthStub(channel)
    found = {}
    for name in (LIVENESS, "", "hiprune.v1.EncoderService"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        found[name] = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return found


async def until(holds) -> None:
    async with asyncio.timeout(10):
        while not await holds():  # noqa: ASYNC110  # in another process
            await asyncio.sleep(0.01)


async def is_ready(channel) -> bool:
    return (await statuses(channel))[""] == "SERVING"


async def is_answered(stub) -> bool:
    try:
        await call(stub.GetEncoder, GetRequest(), GetResponse, peer="encoder", default_s=5)
    except Unavailable:
        return False
    return True


async def is_refused(stub) -> bool:
    return not await is_answered(stub)


def encode(stub, seconds: float, timeout: float = 10):
    request = encoder_service_pb2.EncodeImageRequest(media=media_pb2.Media(image=str(seconds).encode()))
    return stub.EncodeImage(request, timeout=timeout)


async def test_a_service_is_alive_then_ready_and_drains_when_told(process):
    server = process()
    await server.says("starting")
    async with grpc.aio.insecure_channel(server.address) as channel:
        loading = await statuses(channel)
        assert loading == {LIVENESS: "SERVING", "": "NOT_SERVING", "hiprune.v1.EncoderService": "NOT_SERVING"}
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        assert (await error_of(stub.GetEncoder(GetRequest(), timeout=5))).reason == "NOT_READY"
        server.go_on()
        await until(lambda: is_ready(channel))
        assert set((await statuses(channel)).values()) == {"SERVING"}

        reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        listed = [each.name for each in (await reflected.read()).list_services_response.service]
        assert {"hiprune.v1.EncoderService", "grpc.health.v1.Health"} <= set(listed)
        reflected.cancel()

        running = encode(stub, 1)
        await server.says("encoding")
        server.popen.send_signal(signal.SIGTERM)
        await until(lambda: is_refused(stub))  # new ones
        assert not running.done()
        assert (await running).fingerprint.family == "slept"  # and finishes what it has
    await server.says("stopped")
    assert await server.end() == 0


async def test_a_client_that_watches_health_does_not_hold_up_the_drain(process):
    server = process("--drain-ms=30000")
    await server.says("starting")
    server.go_on()
    async with connect(server.address) as channel, grpc.aio.insecure_channel(server.address) as plain:
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        await until(lambda: is_answered(stub))
        watch = health_pb2_grpc.HealthStub(plain).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        begun = time.monotonic()
        server.popen.send_signal(signal.SIGTERM)
        await server.says("stopped")
        assert await server.end() == 0
        assert time.monotonic() - begun < 5


async def test_a_call_on_its_way_while_a_service_says_that_it_leaves_is_answered(process):
    server = process()
    await server.says("starting")
    server.go_on()
    async with grpc.aio.insecure_channel(server.address) as channel:
        await until(lambda: is_ready(channel))
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        server.popen.send_signal(signal.SIGTERM)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.sleep(0.2)  # by then one that stops at once has stopped
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        assert await stub.GetEncoder(GetRequest(), timeout=5) == GetResponse()
    await server.says("stopped")
    assert await server.end() == 0


async def test_a_request_that_outlasts_the_drain_is_given_up(process):
    server = process("--drain-ms=300")
    await server.says("starting")
    server.go_on()
    async with grpc.aio.insecure_channel(server.address) as channel:
        await until(lambda: is_ready(channel))
        running = encode(encoder_service_pb2_grpc.EncoderServiceStub(channel), 20, timeout=30)
        await server.says("encoding")
        server.popen.send_signal(signal.SIGTERM)
        assert type(await error_of(running)) is Unavailable
    await server.says("stopped")
    assert await server.end() == 0


async def test_a_service_that_is_stopped_while_it_starts_leaves_without_being_ready(process):
    server = process()
    await server.says("starting")
    server.popen.send_signal(signal.SIGTERM)
    await server.says("stopped")
    assert await server.end() == 0  # though the thread that was loading never ends


async def test_a_service_that_can_serve_no_more_says_so_and_leaves_with_code_1(process):
    server = process("--drain-ms=500")
    await server.says("starting")
    server.go_on()
    async with grpc.aio.insecure_channel(server.address) as channel:
        await until(lambda: is_ready(channel))
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        image = media_pb2.Media(image=b"break")
        running = stub.EncodeImage(encoder_service_pb2.EncodeImageRequest(media=image), timeout=30)
        await server.says("encoding")
        assert type(await error_of(running)) is Unavailable
    await server.says("stopped")
    assert await server.end() == 1
    assert "can serve no more: it broke" in server.popen.stderr.read()


async def test_an_address_that_cannot_be_bound_is_one_line_and_code_2(process):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for listen in (f"127.0.0.1:{taken.getsockname()[1]}", "unix:/nonexistent/folder/server.sock"):
            server = process(f"--listen={listen}")
            assert await server.end() == 2
            lines = server.popen.stderr.read().splitlines()
            expected = f"hiprune service: listen (--listen): got {listen!r}, which cannot be bound"
            assert [line for line in lines if line.startswith("hiprune")] == [expected]


async def test_one_more_address_is_served_besides_and_one_that_is_taken_is_named(process):
    port = free_port()
    server = process(f"--listen-also=127.0.0.1:{port}")
    await server.says("starting")
    server.go_on()
    for address in (server.address, f"127.0.0.1:{port}"):
        async with grpc.aio.insecure_channel(address) as channel:
            await until(lambda channel=channel: is_ready(channel))
    other = process(f"--listen-also=127.0.0.1:{port}", "--listen=127.0.0.1:0")
    assert await other.end() == 2
    assert f"listen_also (--listen-also): got '127.0.0.1:{port}', which cannot" in other.popen.stderr.read()


async def test_with_tenants_a_socket_that_everybody_may_open_is_refused(process, tmp_path):
    (tmp_path / "tenants.toml").touch(mode=0o600)
    server = process(f"--tenants={tmp_path}/tenants.toml", umask=0)
    assert await server.end() == 2
    (line,) = [line for line in server.popen.stderr.read().splitlines() if line.startswith("hiprune")]
    assert f"got '{server.address}', which everybody on this machine may open (mode 0777)" in line
    also = f"unix:{tmp_path}/also.sock"
    flags = (f"--tenants={tmp_path}/tenants.toml", "--listen=127.0.0.1:0", f"--listen-also={also}")
    server = process(*flags, umask=0)
    assert await server.end() == 2
    said = server.popen.stderr.read()
    assert f"listen_also (--listen-also): got '{also}', which everybody on this machine may open" in said


async def test_keys_in_plain_text_beyond_this_machine_are_warned_of(process):
    for listen, warned in (("0.0.0.0:0", True), ("127.0.0.1:0", False)):
        server = process(f"--listen={listen}", "--allow-anonymous", "--peer-token=" + "t" * 16)
        await server.says("starting")
        server.popen.send_signal(signal.SIGTERM)
        assert await server.end() == 0
        assert ("in plain text" in server.popen.stderr.read()) is warned
