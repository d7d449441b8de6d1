"""Calls that need no key: health and reflection. Lets them in so that strangers cannot fill memory with them.

gRPC has one bound for the messages of all methods, and holds a message whole before it hands it over. So few
such messages are read at a time, each for a short time, and who has not finished for longest gives way: a
probe's few bytes come with its call, and are never the ones that do. Knows no method.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from hiprune.errors import Exhausted, Expired, HipruneError, InvalidInput, to_status
from hiprune.intake import SMALL_REQUEST

MAX_READING: Final = 4
"""Messages that are read at a time."""
READ_S: Final = 5.0
"""Time in which a message must have arrived, and in which reflection's next question must come."""


class Visitors:
    """All calls without a key of one server. Belongs to its event loop."""

    def __init__(self, max_reading: int = MAX_READING, read_s: float = READ_S) -> None:
        self._max_reading = max_reading
        self._read_s = read_s
        self._reading: dict[asyncio.Timeout, bool] = {}
        """Those being read, the longest first; and whether each was told to give way."""

    def guard(self, handler: Any) -> Any:
        """The same method, that reads under these bounds."""
        parse: Callable[[bytes], Any] = handler.request_deserializer

        async def guarded(_: object, context: Any) -> None:
            try:
                if handler.request_streaming:
                    answers = handler.stream_stream(self._messages(context, parse), context)
                else:
                    behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
                    answers = behaviour(_parsed(await self.read(context) or b"", parse), context)
                await _send(answers, context)
            except HipruneError as error:
                await context.abort_with_status(rpc_status.to_status(to_status(error)))
            except NotImplementedError:  # of a newer standard than what we serve it with
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "is not served here")

        return grpc.stream_stream_rpc_method_handler(guarded, response_serializer=handler.response_serializer)

    async def read(self, context: Any) -> bytes | None:
        """One message, as bytes; None where the client sends no more.

        Raises Expired, Exhausted for who had to give way, InvalidInput for what is too large for any.
        """
        waiting = [each for each, told in self._reading.items() if not told]
        if len(waiting) >= self._max_reading:
            self._reading[waiting[0]] = True
            waiting[0].reschedule(asyncio.get_running_loop().time())
        limit = asyncio.timeout(self._read_s)
        try:
            async with limit:
                self._reading[limit] = False
                try:
                    message = await context.read()
                finally:
                    gave_way = self._reading.pop(limit)
        except TimeoutError as error:
            if gave_way:
                raise Exhausted("too many calls without a key at a time") from error
            raise Expired(f"no message came within {self._read_s:g} s") from error
        if message is grpc.aio.EOF:
            return None
        if len(message) > SMALL_REQUEST:
            raise InvalidInput(f"{len(message)} bytes of request, expected at most {SMALL_REQUEST}")
        found: bytes = message
        return found

    async def _messages(self, context: Any, parse: Callable[[bytes], Any]) -> AsyncIterator[Any]:
        while (message := await self.read(context)) is not None:
            yield _parsed(message, parse)


def _parsed(message: bytes, parse: Callable[[bytes], Any]) -> Any:
    """The message. Raises InvalidInput."""
    try:
        return parse(message)
    except DecodeError as error:
        raise InvalidInput(f"{len(message)} bytes that are no message of this method") from error


async def _send(answers: Any, context: Any) -> None:
    """Sends what a behaviour of any kind answers with."""
    if isinstance(answers, AsyncIterator):
        async for answer in answers:
            await context.write(answer)
    elif inspect.isawaitable(answers):
        answer = await answers
        if answer is not None:  # else it has written for itself
            await context.write(answer)
