"""Work on large requests beside the event loop, one at a time, so that small ones go on meanwhile.

What is C and holds the interpreter for all of a call, as reading JSON does, still holds it: the loop gets its
turn between two calls. Knows nothing of what is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

SMALL_WORK: Final = 256 * 2**10
"""Up to so many bytes it is done at once: a thread's turn would take longer."""


class Worker:
    """One thread. Belongs to its event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="parse")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """What `work` on so many bytes makes, or raises."""
        if size <= SMALL_WORK:
            return work()
        # in lists that are emptied: the thread keeps `do` a while longer, and a future's callbacks are a
        # cycle, which would keep megabytes until the collector comes
        todo = [work]
        del work
        made: list[T] = []
        failed: list[Exception] = []

        def do() -> None:
            try:
                made.append(todo.pop()())
            except Exception as error:
                failed.append(error)

        await asyncio.get_running_loop().run_in_executor(self._thread, do)
        if failed:
            raise failed.pop()
        return made.pop()
