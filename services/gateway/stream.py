"""An answer as server-sent events: sent as it comes, and let go when nobody listens any more.

Source of the format: the HTML standard, "Server-sent events". OpenAI's streams end with `data: [DONE]`, and
an error within one is an event of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, ExitStack, aclosing
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hiprune.errors import HipruneError
from services.gateway import answers
from services.gateway.errors import HttpError, from_hiprune, unforeseen
from services.gateway.exchange import CLIENT_LEFT, Exchange
from services.gateway.intake import ClientLeft

log = logging.getLogger("hiprune.gateway")

_HEADERS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # proxies that collect answers: not this one
}


class EventStream(Response):
    """Sends chunks as they come. `resources` are what the request holds; they are let go at its end."""

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], headers: Mapping[str, str], resources: AsyncExitStack
    ) -> None:
        self._chunks = chunks
        self._resources = resources
        self._exchange: Exchange | None = None
        self._ends = ExitStack()
        self.status_code = 200
        self.background = None
        self.init_headers({**_HEADERS, **headers})

    def ends_with(self, exchange: Exchange, ends: ExitStack) -> None:
        """What is to be closed when the stream has ended, and told how it did."""
        self._exchange, self._ends = exchange, ends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        with self._ends:
            try:
                await self._send_all(send)
            except ClientLeft:
                self._tell(CLIENT_LEFT, "client_left")

    async def _send_all(self, send: Send) -> None:
        async with self._resources, aclosing(self._chunks) as chunks:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last = b""
            try:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except HipruneError as error:
                last = self._error(from_hiprune(error))
            except asyncio.CancelledError:
                # the drain is over; if it is the client that has left, nothing is sent
                await send({"type": "http.response.body", "body": self._error(_CUT), "more_body": False})
                raise
            except Exception:
                log.exception("unforeseen error in a stream")
                last = self._error(unforeseen())
            await send({"type": "http.response.body", "body": last, "more_body": False})

    def _error(self, error: HttpError) -> bytes:
        self._tell(error.status, error.code)
        return answers.event(error.content())

    def _tell(self, status: int, code: str) -> None:
        if self._exchange is not None:
            self._exchange.failed(status, code)


_CUT: Final = HttpError(
    503, "this gateway leaves before the answer has ended", kind="server_error", code="draining"
)
