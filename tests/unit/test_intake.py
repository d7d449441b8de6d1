"""Bytes that would become more memory than a request can need never become a message."""

import asyncio
import threading

import pytest
from google.protobuf.internal import encoder
from google.protobuf.message import DecodeError

from hiprune import auth
from hiprune.auth import Caller, Tenant
from hiprune.errors import Exhausted, InvalidInput
from hiprune.intake import BYTES_A_FIELD, MAX_FIELDS, SMALL_REQUEST, Intake, check_fields
from hiprune.v1 import encoder_service_pb2, llm_service_pb2, media_pb2, pruner_service_pb2, tensor_pb2

ASK = "/hiprune.v1.ImageQaService/AskImage"
AskImage = llm_service_pb2.AskImageRequest


def never(request: bytes) -> AskImage:
    raise AssertionError(f"{len(request)} bytes were parsed")


async def taken(intake: Intake, request: bytes, parse=AskImage.FromString) -> AskImage:
    async with intake.message(ASK, request, parse) as message:
        return message


def nested(*numbers: int, times: int) -> bytes:
    """Empty messages, `times` over, below fields of these numbers."""
    data = encoder.TagBytes(numbers[-1], 2) + b"\0"
    data *= times
    for number in reversed(numbers[:-1]):
        data = encoder.TagBytes(number, 2) + encoder._VarintBytes(len(data)) + data
    return data


def a_request() -> AskImage:
    parts = [
        llm_service_pb2.Part(text="what is it?" * 100),
        llm_service_pb2.Part(media=media_pb2.Media(image=bytes(100_000))),
    ]
    return AskImage(
        messages=[llm_service_pb2.Message(role=llm_service_pb2.ROLE_USER, parts=parts)] * 50,
        policy=pruner_service_pb2.PrunePolicy(keep_ratio=0.2, object_layer=3),
    )


@pytest.mark.parametrize("path", [(1,), (1, 2), (1, 2, 2), (1, 2, 3, 1), (3, 5), (3, 1), (99,), (2, 99)])
async def test_a_request_of_countless_fields_is_refused_before_it_is_parsed(path) -> None:
    request = nested(*path, times=MAX_FIELDS + 1)
    with pytest.raises(InvalidInput, match=f"more than {MAX_FIELDS} fields") as caught:
        await taken(Intake(), request, never)
    assert caught.value.reason == "LIMIT_EXCEEDED"


@pytest.mark.parametrize("path", [(99,), (3, 5)])
async def test_fields_grow_with_the_bytes_that_they_hold(path) -> None:
    most = 2 * MAX_FIELDS
    padding = (
        encoder.TagBytes(98, 2) + encoder._VarintBytes(most * BYTES_A_FIELD) + bytes(most * BYTES_A_FIELD)
    )
    await taken(Intake(), nested(*path, times=most - 10) + padding)
    with pytest.raises(InvalidInput, match="fields"):
        await taken(Intake(), nested(*path, times=most + 10_000) + padding, never)


async def test_a_large_request_arrives_as_it_was_sent() -> None:
    request = a_request()
    assert request.ByteSize() > SMALL_REQUEST
    assert await taken(Intake(), request.SerializeToString()) == request


def test_every_field_counts_once() -> None:
    kind = AskImage.DESCRIPTOR
    # 50 messages with a role and 2 parts of 1 and 2 fields; a policy of 2
    data, fields = a_request().SerializeToString(), 50 * (1 + 1 + 2 + 1 + 2) + 1 + 2
    check_fields(data, kind, most=fields)
    with pytest.raises(InvalidInput):
        check_fields(data, kind, most=fields - 1)


def test_tensors_of_many_views_count_few_fields() -> None:
    tensor = tensor_pb2.Tensor(dtype=1, shape=[576, 1024], data=bytes(1000))
    scores = [encoder_service_pb2.LayerAttention(layer=layer, scores=tensor) for layer in (9, 23)]
    view = encoder_service_pb2.View(
        features=tensor, aligned=tensor, attention=scores, grid_height=24, grid_width=24
    )
    data = pruner_service_pb2.PruneTokensRequest(views=[view] * 1000).SerializeToString()
    check_fields(data, pruner_service_pb2.PruneTokensRequest.DESCRIPTOR, most=MAX_FIELDS)


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",
        b"\x0a\xff",
        b"\xff" * 20,
        b"\x0a\x80\x80",
        b"\x0a\x05\x12",
        b"\x08",
        b"\x0d\0",
        b"\x0f",
        b"\x0a\x02\x12\x05AAAAA",
        b"\x0a\x01\x12\0\0",
        b"\x09\0",
    ],
)
def test_what_is_malformed_is_refused_here_as_by_the_parser(data) -> None:
    with pytest.raises(DecodeError):
        AskImage.FromString(data)
    with pytest.raises(InvalidInput, match="no message of this method"):
        check_fields(data, AskImage.DESCRIPTOR, most=100)


async def test_a_malformed_end_does_not_let_countless_fields_through() -> None:
    for path in [(1,), (1, 2), (1, 2, 2)]:
        with pytest.raises(InvalidInput):
            await taken(Intake(), nested(*path, times=MAX_FIELDS + 1) + b"\x0f", never)


def test_unknown_fields_and_groups_pass_as_they_pass_the_parser() -> None:
    group = encoder.TagBytes(77, 3) + b"\x08\1" + encoder.TagBytes(77, 4)
    data = b"\x09" + bytes(8) + b"\x0d" + bytes(4) + group + encoder.TagBytes(70, 0) + b"\xff\1"
    AskImage.FromString(data)
    check_fields(data, AskImage.DESCRIPTOR, most=10)


async def test_garbage_of_any_size_is_refused_as_no_message() -> None:
    for size in (4, SMALL_REQUEST, 10 * SMALL_REQUEST):
        with pytest.raises(InvalidInput, match=f"{size} bytes that are no message"):
            await taken(Intake(), b"\x0f" * size)


async def test_a_methods_bound_is_held_before_anything_is_read() -> None:
    intake = Intake()
    intake.limit({ASK: 100})
    assert await taken(intake, b"") == AskImage()
    with pytest.raises(InvalidInput, match="101 bytes of request, expected at most 100") as caught:
        await taken(intake, bytes(101), never)
    assert caught.value.reason == "LIMIT_EXCEEDED"


async def test_requests_that_are_served_hold_a_bounded_number_of_bytes() -> None:
    intake = Intake(max_held_bytes=100)
    request = AskImage(model="m" * 60).SerializeToString()
    async with intake.message(ASK, request, AskImage.FromString):
        with pytest.raises(Exhausted, match="at most 100") as caught:
            await taken(intake, request, never)
        assert caught.value.reason == "OVERLOADED"
        assert caught.value.retry_after_s == 1
        await taken(intake, request[:0])
    await taken(intake, request)
    with pytest.raises(InvalidInput):
        await taken(intake, b"\x0f" * 80)
    await taken(intake, request)  # what was refused is no longer held
    # one that is alone is let in, whatever its size
    assert (await taken(intake, AskImage(model="m" * 600).SerializeToString())).model


async def held(intake: Intake, tenant: str, size: int, until: asyncio.Event) -> None:
    auth.enter(Caller(Tenant(tenant)))
    request = AskImage(model="m" * (size - 2 if size < 130 else size - 3)).SerializeToString()
    assert len(request) == size
    async with intake.message(ASK, request, AskImage.FromString):
        await until.wait()


async def test_no_tenant_holds_more_than_is_left_for_the_others() -> None:
    intake, end = Intake(max_held_bytes=1200), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def is_let_in(tenant: str, size: int) -> bool:
        tasks.append(asyncio.create_task(held(intake, tenant, size, end)))
        await asyncio.sleep(0)
        return not tasks[-1].done()

    flood = [await is_let_in("flood", 200) for _ in range(5)]
    assert flood == [True, True, True, False, False]  # half of all
    other = [await is_let_in("other", 100) for _ in range(5)]
    assert other == [True, True, True, False, False]  # half of what the flood has left
    assert await is_let_in("third", 100)
    with pytest.raises(Exhausted, match="900 bytes are being served, 300 of them of this tenant's, 100 more"):
        await tasks[9]
    end.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (intake._held, intake._held_by) == (0, {})


@pytest.mark.parametrize("size", [0, 10])
async def test_a_request_and_its_answer_count_until_both_are_gone(size) -> None:
    intake = Intake()
    async with intake.message(ASK, b"", AskImage.FromString):
        with intake.answer(size), intake.answer(0):
            assert intake._held == size
    assert (intake._held, intake._held_by) == (0, {})


async def test_tenants_take_turns_at_being_read() -> None:
    intake, begun, go_on = Intake(), threading.Event(), threading.Event()
    order: list[str] = []
    request = AskImage(model="m" * 300_000).SerializeToString()

    async def read(tenant: str) -> None:
        auth.enter(Caller(Tenant(tenant)))

        def parse(data: bytes) -> AskImage:
            order.append(tenant)
            begun.set()
            go_on.wait()
            return AskImage.FromString(data)

        await taken(intake, request, parse)

    tasks = [asyncio.create_task(read("flood")) for _ in range(6)]
    await asyncio.to_thread(begun.wait)
    tasks += [asyncio.create_task(read("other")) for _ in range(2)]
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(*tasks)
    assert order[:4] == ["flood", "other", "flood", "other"]


async def test_one_that_leaves_while_it_is_read_is_no_longer_held() -> None:
    intake = Intake(max_held_bytes=10**6)
    request = a_request().SerializeToString()
    task = asyncio.create_task(taken(intake, request[:900_000] and request))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with intake.message(ASK, b"", AskImage.FromString):
        pass
    assert intake._held == 0
