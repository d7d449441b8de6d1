"""Time limits that do not take this process's own lateness for somebody else's.

An event loop that was held up, by a large message or by threads that hold the interpreter, finds its timers
due before it has read the answers that came meanwhile: a store that answers in a millisecond would count as
away. Knows nothing of what is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

Result = TypeVar("Result")

_SLICES: Final = 5
"""A limit is as many timers, one after the other: by how much one is late is not counted."""


async def is_done(task: asyncio.Future[Any], seconds: float) -> bool:
    """Whether a task is done within so many seconds in which this loop was there to see it. Cancels nothing.

    Takes longer only where the loop was late, by no more than as many times as there are slices.
    """
    for _ in range(_SLICES):
        done, _ = await asyncio.wait({task}, timeout=seconds / _SLICES)
        if done:
            return True
    return False


async def within(work: Coroutine[Any, Any, Result], seconds: float) -> Result:
    """The result of `work`, if it is done within so many seconds as `is_done` measures them.

    Else it is cancelled. Raises TimeoutError, as `work`.
    """
    task = asyncio.ensure_future(work)
    try:
        if await is_done(task, seconds):
            return task.result()
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
