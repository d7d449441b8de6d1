"""Claims about time limits in a process that is late itself."""

from __future__ import annotations

import asyncio
import time

import pytest

from hiprune.lateness import is_done, within

LIMIT_S = 0.05


async def steps(count: int) -> str:
    """What needs the event loop so many times, and of time nothing."""
    for _ in range(count):
        await asyncio.sleep(0)
    return "done"


async def test_what_a_loop_that_was_away_has_not_seen_is_not_late():
    task = asyncio.create_task(steps(10))
    asyncio.get_running_loop().call_soon(time.sleep, 4 * LIMIT_S)
    assert await is_done(task, LIMIT_S)
    asyncio.get_running_loop().call_soon(time.sleep, 4 * LIMIT_S)
    assert await within(steps(10), LIMIT_S) == "done"


async def test_what_takes_too_long_is_cancelled_and_a_task_that_is_asked_after_is_not():
    ended = asyncio.Event()

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(for_ever())
    assert not await is_done(task, LIMIT_S)
    assert not ended.is_set()
    task.cancel()
    await asyncio.wait({task})
    ended.clear()
    with pytest.raises(TimeoutError):
        await within(for_ever(), LIMIT_S)
    assert ended.is_set()


async def test_who_leaves_takes_the_work_along_and_errors_come_through():
    ended = asyncio.Event()

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    waiting = asyncio.create_task(within(for_ever(), 60))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()

    async def fails() -> None:
        raise ValueError("theirs")

    with pytest.raises(ValueError, match="theirs"):
        await within(fails(), 60)
