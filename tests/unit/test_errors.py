"""Errors over real gRPC: what a service raises is what its client catches."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiprune import errors
from hiprune.calls import call, connect
from hiprune.errors import DOMAIN, Exhausted, Expired, HipruneError, Internal, InvalidInput, Unavailable
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc

CLASSES = sorted(HipruneError.__subclasses__(), key=lambda kind: kind.__name__)


class Raises(encoder_service_pb2_grpc.EncoderServiceServicer):
    """Raises `error` for every request, or sends `status`."""

    error: Exception
    status: status_pb2.Status | None = None

    async def GetEncoder(self, request, context):
        if self.status is not None:
            await context.abort_with_status(rpc_status.to_status(self.status))
        raise self.error

    def register(self, server):
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(self, server)


@pytest.fixture
def service():
    return Raises()


@pytest.fixture
async def stub(service, serve):
    return encoder_service_pb2_grpc.EncoderServiceStub(await serve(service.register))


async def caught_from(stub) -> HipruneError:
    with pytest.raises(HipruneError) as caught:
        await ask(stub)
    return caught.value


async def ask(stub, peer="encoder"):
    request = encoder_service_pb2.GetEncoderRequest()
    await call(stub.GetEncoder, request, encoder_service_pb2.GetEncoderResponse, peer=peer, default_s=10)


def test_every_class_has_a_code_of_its_own_and_stands_in_the_tree():
    assert len({kind.code for kind in CLASSES}) == len(CLASSES) == 10
    for kind in CLASSES:
        assert f"{kind.__name__} " in errors.__doc__
        assert kind.code.name in errors.__doc__


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
async def test_an_error_keeps_class_reason_field_and_retry_across_a_hop(kind, service, stub):
    for error in (
        kind("it is 7, expected 8"),
        kind("it is 7, expected 8", reason="SPECIAL", field="views[0].features", retry_after_s=1.5),
        kind("", reason="SPECIAL", field="policy.alpha"),
        kind("no field", retry_after_s=0),
    ):
        service.error = error
        found = await caught_from(stub)
        assert type(found) is kind
        assert (found.reason, found.field, found.retry_after_s) == (
            error.reason,
            error.field,
            error.retry_after_s,
        )
        assert found.message == error.message or not error.message
        assert isinstance(found.__cause__, grpc.aio.AioRpcError)


async def test_an_error_keeps_all_of_it_across_two_hops(service, stub, serve):
    service.error = InvalidInput("7 is outside [0, 1]", field="policy.alpha", reason="LIMIT_EXCEEDED")
    front = Raises()
    front.error = await caught_from(stub)
    found = await caught_from(encoder_service_pb2_grpc.EncoderServiceStub(await serve(front.register)))
    assert str(found) == str(service.error) == "policy.alpha: 7 is outside [0, 1]"
    assert (found.reason, found.field) == ("LIMIT_EXCEEDED", "policy.alpha")


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(milliseconds=st.integers(0, 10**7))
def test_a_retry_delay_is_kept_to_the_millisecond(milliseconds):
    status = errors.to_status(Exhausted("full", retry_after_s=milliseconds / 1000))
    info = error_details_pb2.RetryInfo()
    status.details[1].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == milliseconds


async def test_a_status_carries_google_rpc_details(service, stub):
    service.error = InvalidInput("7 is outside [0, 1]", field="policy.alpha", retry_after_s=2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetEncoder(encoder_service_pb2.GetEncoderRequest(), timeout=10)
    status = rpc_status.from_call(caught.value)
    assert caught.value.details() == status.message == "policy.alpha: 7 is outside [0, 1]"
    info, bad, retry = status.details
    found = error_details_pb2.ErrorInfo.FromString(info.value)
    assert (found.reason, found.domain, dict(found.metadata)) == (
        "INVALID_FIELD",
        DOMAIN,
        {"field": "policy.alpha"},
    )
    violation = error_details_pb2.BadRequest.FromString(bad.value).field_violations[0]
    assert (violation.field, violation.description) == ("policy.alpha", "7 is outside [0, 1]")
    assert error_details_pb2.RetryInfo.FromString(retry.value).retry_delay.seconds == 2


@pytest.mark.parametrize("letter", ["x", "é", "漢", "😀", "\n", "\udc80"], ids=ascii)
async def test_a_very_long_message_is_cut_and_the_rest_of_the_error_arrives(letter, service, stub):
    service.error = InvalidInput(letter * 50_000, field="views[3].attention", reason="MISSING_FIELD")
    found = await caught_from(stub)
    assert (type(found), found.reason, found.field) == (InvalidInput, "MISSING_FIELD", "views[3].attention")
    assert 200 < len(found.message) < 1100


async def test_what_grpc_says_itself_has_a_reason_that_names_the_peer():
    async with connect("unix:/nonexistent/encoder.sock") as channel:
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        found = await caught_from(stub)
        assert (type(found), found.reason) == (Unavailable, "ENCODER_UNREACHABLE")
        assert "the encoder cannot be reached" in found.message


async def test_a_method_that_nobody_serves_is_unsupported(serve):
    found = await caught_from(encoder_service_pb2_grpc.EncoderServiceStub(await serve()))
    assert (found.code, found.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED")


async def test_a_message_above_a_limit_is_not_taken_for_overload(serve):
    class Verbose(encoder_service_pb2_grpc.EncoderServiceServicer):
        async def GetEncoder(self, request, context):
            fingerprint = encoder_service_pb2.ModelFingerprint(family="x" * 5 * 2**20)
            return encoder_service_pb2.GetEncoderResponse(fingerprint=fingerprint)

    def register(server):
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(Verbose(), server)

    found = await caught_from(encoder_service_pb2_grpc.EncoderServiceStub(await serve(register)))
    assert (type(found), found.reason) == (Exhausted, "LIMIT_EXCEEDED")


async def test_a_code_outside_the_tree_is_internal(service, stub):
    service.status = status_pb2.Status(code=grpc.StatusCode.DATA_LOSS.value[0], message="lost")
    found = await caught_from(stub)
    assert type(found) is Internal


async def test_a_peer_that_leaves_as_the_call_comes_in_is_unavailable(service, stub):
    service.status = status_pb2.Status(code=grpc.StatusCode.CANCELLED.value[0], message="CANCELLED")
    found = await caught_from(stub)
    assert (type(found), found.reason) == (Unavailable, "ENCODER_STOPPED")


async def test_ones_own_cancelling_stays_a_cancellation(serve):
    class Slow(encoder_service_pb2_grpc.EncoderServiceServicer):
        async def GetEncoder(self, request, context):
            await asyncio.sleep(20)

    def register(server):
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(Slow(), server)

    asking = asyncio.create_task(ask(encoder_service_pb2_grpc.EncoderServiceStub(await serve(register))))
    await asyncio.sleep(0.1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


@pytest.mark.parametrize("kind", ["google.rpc.ErrorInfo", "google.rpc.RetryInfo", "who.knows.What"])
async def test_details_that_cannot_be_read_cost_the_details_alone(kind, service, stub):
    damaged = any_pb2.Any(type_url=f"type.googleapis.com/{kind}", value=b"\xff\xff\xff")
    service.status = status_pb2.Status(code=9, message="not yours", details=[damaged])
    found = await caught_from(stub)
    assert (found.code, found.message) == (grpc.StatusCode.FAILED_PRECONDITION, "not yours")


def test_under_moves_the_field_and_keeps_the_rest():
    error = Exhausted("too much", reason="QUOTA", field="policy.keep_count", retry_after_s=3)
    moved = error.under("messages[2]")
    assert type(moved) is Exhausted
    assert (moved.field, moved.reason, moved.message, moved.retry_after_s) == (
        "messages[2].policy.keep_count",
        "QUOTA",
        "too much",
        3,
    )
    assert moved.__cause__ is error


def test_under_leaves_an_error_without_a_field_alone():
    error = Expired("too late")
    assert error.under("media") is error
