"""Where the gateway works on large requests."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from services.gateway.worker import SMALL_WORK, Worker


class Made:
    """Something that can be watched."""


async def test_large_work_is_done_beside_the_loop_and_small_work_at_once():
    worker, here = Worker(), threading.get_ident()
    assert await worker.run(SMALL_WORK, threading.get_ident) == here
    assert await worker.run(SMALL_WORK + 1, threading.get_ident) != here


async def test_what_was_made_is_kept_by_nobody_else():
    worker = Worker()
    gc.disable()
    try:
        made = await worker.run(SMALL_WORK + 1, Made)
        gone = weakref.ref(made)
        del made
        assert gone() is None
    finally:
        gc.enable()


async def test_what_fails_there_is_raised_here():
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await Worker().run(SMALL_WORK + 1, fail)
