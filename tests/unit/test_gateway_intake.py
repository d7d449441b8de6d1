"""What the gateway takes in at a time, and how it learns that nobody waits any more."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hiprune.errors import Exhausted, InvalidInput, Unauthenticated, Unavailable
from services.gateway.errors import HttpError
from services.gateway.intake import SMALL_BODY, ClientLeft, Intake, Receive, while_connected
from services.gateway.settings import Settings


def parts(*chunks: bytes, left: bool = False) -> Receive:
    """A client that sends these, and then waits, or leaves."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": chunk, "more_body": left or number < len(chunks) - 1}
        for number, chunk in enumerate(chunks)
    ]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        if left:
            return {"type": "http.disconnect"}
        return await asyncio.Event().wait()

    return receive


def no_more_than(*chunks: bytes) -> Receive:
    """A client of whom these are read, and of what it has besides nothing."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        assert left, "it was read on"
        return {"type": "http.request", "body": left.pop(0), "more_body": True}

    return receive


async def anybody() -> None:
    """Vouches for all."""


async def nobody() -> None:
    raise Unauthenticated("no such key")


async def test_bodies_are_held_up_to_a_bound_and_let_go():
    intake = Intake(Settings(max_held_bytes=1500))
    async with intake.body(parts(bytes(1000)), "1000", anybody) as body:
        assert body == bytes(1000)
        for announced in ("1000", None):
            with pytest.raises(Exhausted):
                async with intake.body(parts(bytes(1000)), announced, anybody):
                    pass
        async with intake.body(parts(bytes(250), bytes(250)), None, anybody):
            pass
    async with intake.body(parts(bytes(2000)), "2000", anybody):  # alone, one may be larger
        pass
    async with intake.body(parts(bytes(1000)), "1000", anybody):
        pass


async def test_a_large_body_is_read_on_when_its_client_is_known():
    intake = Intake(Settings())
    large = bytes(SMALL_BODY + 1)
    async with intake.body(parts(large), str(len(large)), anybody) as body:
        assert len(body) == len(large)
    for announced, chunks in ((str(len(large)), ()), (None, (large,))):
        with pytest.raises(Unauthenticated):
            async with intake.body(no_more_than(*chunks), announced, nobody):
                pass
    async with intake.body(parts(bytes(SMALL_BODY)), str(SMALL_BODY), nobody):
        pass  # the llm says so anyway, and soon


@pytest.mark.parametrize("size", [1000, 2 * SMALL_BODY])
async def test_what_a_stranger_says_will_come_takes_no_room(size):
    intake = Intake(Settings(max_held_bytes=size * 3 // 2))

    async def idle() -> None:
        await asyncio.Event().wait()

    async def waits() -> dict[str, Any]:
        return await asyncio.Event().wait()

    async def stranger() -> None:
        async with intake.body(waits, str(size), idle):
            pass

    strangers = [asyncio.create_task(stranger()) for _ in range(3)]
    await asyncio.sleep(0)
    async with intake.body(parts(bytes(size)), str(size), anybody) as body:
        assert len(body) == size
        with pytest.raises(Exhausted):  # of who is known it counts before it has come
            async with intake.body(no_more_than(bytes(size)), str(size), anybody):
                pass
    for task in strangers:
        task.cancel()
    await asyncio.wait(strangers)


@pytest.mark.parametrize("announced", ["-1", "1e3", "many", "", "\u0661"])
async def test_a_length_that_is_no_number_is_refused(announced):
    with pytest.raises(InvalidInput):
        async with Intake(Settings()).body(parts(b""), announced, anybody):
            pass


async def test_a_client_that_leaves_within_its_body_has_left():
    with pytest.raises(ClientLeft):
        async with Intake(Settings()).body(parts(b"{", left=True), None, anybody):
            pass


async def test_nothing_is_let_in_while_draining():
    intake = Intake(Settings())
    intake.draining = True
    with pytest.raises(Unavailable), intake.request():
        pass


async def test_work_ends_when_its_client_leaves_and_not_before():
    leaves = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await leaves.wait()
        return {"type": "http.disconnect"}

    async with while_connected(receive):
        await asyncio.sleep(0)
    leaves.set()
    with pytest.raises(ClientLeft):
        async with while_connected(receive):
            await asyncio.Event().wait()
    await asyncio.sleep(0)  # and nothing of it is left behind


async def test_another_cancelling_is_not_taken_for_the_clients():
    async def work() -> None:
        async with while_connected(parts()):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_time_limit_around_it_stays_a_time_limit():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), while_connected(parts()):
            await asyncio.Event().wait()


async def test_a_body_above_the_bound_is_refused_and_not_read_if_it_says_so():
    async def unread() -> dict[str, Any]:
        raise AssertionError("it was read")

    intake = Intake(Settings(max_body_bytes=1024))
    for announced, receive in (("1025", unread), (None, parts(bytes(1025)))):
        with pytest.raises(HttpError) as refused:
            async with intake.body(receive, announced, anybody):
                pass
        assert refused.value.status == 413
