"""Requests as they arrive over HTTP: how many, how large, how long, and whether their client is still there.

A body is read when it is known that it may come: its announced length is held against the bound before a byte
of it is kept, and a large one waits until the llm knows its client's key. Of a client that nobody has vouched
for counts what has come, and not what it says will: a word costs it nothing. Knows no route and no content.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, TypeAlias

from hiprune import telemetry
from hiprune.errors import Exhausted, InvalidInput, Unavailable
from services.gateway.errors import HttpError
from services.gateway.settings import Settings

Receive: TypeAlias = Callable[[], Awaitable[Any]]
"""ASGI's, by which the parts of a body come, and that the client has left."""

SMALL_BODY: Final = 2**20
"""Bodies up to it, in bytes, are read before anybody is asked about the key."""


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Intake:
    """The requests of one process. Belongs to its event loop."""

    def __init__(self, settings: Settings) -> None:
        self._max_requests = settings.max_requests
        self._max_body = settings.max_body_bytes
        self._max_held = settings.max_held_bytes
        self._body_s = settings.body_timeout_ms / 1000
        self._running = 0
        self._held = 0
        self.draining = False
        """No new request is let in."""

    def watch(self) -> None:
        """Shows what is under way to whoever reads metrics."""
        telemetry.watch("hiprune.running", lambda: self._running, pool="requests")
        telemetry.measure("hiprune.running.limit", self._max_requests, pool="requests")
        telemetry.watch("hiprune.intake.held", lambda: self._held)

    @contextmanager
    def request(self) -> Iterator[None]:
        """A place among those that are served. Raises Unavailable, Exhausted."""
        if self.draining:
            raise Unavailable("this gateway is leaving; another one may answer", reason="DRAINING")
        if self._running >= self._max_requests:
            raise Exhausted(f"{self._running} requests are being served, no more at a time", retry_after_s=1)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    @asynccontextmanager
    async def body(
        self, receive: Receive, announced: str | None, vouch: Callable[[], Awaitable[object]]
    ) -> AsyncIterator[bytearray]:
        """The body of a request, counted among what is held while inside.

        `announced` is its content-length; without one it is counted as it comes. `vouch` raises for a client
        that is not known, and is asked before a large body is read on.

        Raises HttpError (413, 408), Exhausted, ClientLeft, InvalidInput, and what `vouch` raises.
        """
        size = 0
        if announced is not None:
            if not (announced.isascii() and announced.isdigit()):
                raise InvalidInput("the header content-length is no number")
            size = int(announced)
            self._check(size)
        taken = 0
        vouched = size > SMALL_BODY
        try:
            if vouched:
                await vouch()
                taken = self._take(size)
            body = bytearray()
            try:
                async with asyncio.timeout(self._body_s):
                    async for chunk in _chunks(receive):
                        body += chunk
                        self._check(len(body))
                        if len(body) > taken:
                            taken += self._take(len(body) - taken)
                        if len(body) > SMALL_BODY and not vouched:
                            await vouch()
                            vouched = True
            except TimeoutError as error:
                raise HttpError(
                    408,
                    f"the body did not come within {self._body_s:g} s",
                    code="request_timeout",
                    headers={"connection": "close"},  # and not a wait for its rest
                ) from error
            yield body
        finally:
            self._held -= taken

    def _check(self, size: int) -> None:
        if size > self._max_body:
            raise HttpError(
                413,
                f"{size} bytes of body, expected at most {self._max_body}",
                code="request_too_large",
            )

    def _take(self, size: int) -> int:
        if size and self._held and self._held + size > self._max_held:
            raise Exhausted(
                f"bodies of {self._held} bytes are held, {size} more, at most {self._max_held}",
                retry_after_s=1,
            )
        self._held += size
        return size


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancels what is inside when the client leaves, and raises ClientLeft then. The body has been read."""
    task = asyncio.current_task()
    left = over = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        if not over and task is not None:
            left = True
            task.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not left or task is None or task.uncancel() > 0:  # somebody else's
            raise
        raise ClientLeft from None
    finally:
        over = True
        watching.cancel()
