"""Requests as they arrive: bytes, held against their bounds before they become messages.

Two bytes of a serialised message can make seventy in memory, an empty message in a repeated field, so that a
bound on bytes alone is none on memory. Knows the wire format and the descriptors; knows no method's rules.

Source of the wire format: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from hiprune import auth, telemetry
from hiprune.errors import Exhausted, InvalidInput
from hiprune.workers import Workers

MAX_HELD_BYTES: Final = 2**30
"""Of all requests that are being served and answers that are being sent; each is in memory about twice, as
bytes and as a message."""
SMALL_REQUEST: Final = 64 * 2**10
"""Requests up to it need no count of their fields, and fit a method that takes none to speak of."""
ROOM: Final = 4 * 2**20
"""What a method's bound has above its largest fields: one a little too large is refused by its name."""
MAX_FIELDS: Final = 100_000
BYTES_A_FIELD: Final = 256
"""A request has at most MAX_FIELDS fields, or one for each so many of its bytes."""
_THREAD_BYTES: Final = 256 * 2**10
"""Requests above it are parsed off the event loop, tenants in turn."""
_MAX_WAITING: Final = 4096
"""Of requests that wait to be parsed, in MiB and one for each: more than those that are held can come to."""

Parse = Callable[[bytes], Message]


class Intake:
    """What lets requests in: one for each server. Belongs to its event loop."""

    def __init__(self, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self._max_held_bytes = max_held_bytes
        self._held = 0
        self._held_by: dict[str, int] = {}  # owners, of those who hold anything
        self._limits: Mapping[str, int] = {}
        self._parser = Workers(1, "parse", waiting_for="to be read", max_waiting=_MAX_WAITING)

    def limit(self, request_bytes: Mapping[str, int]) -> None:
        """Sets the largest request of each method, by its path; a method that is not named has no bound."""
        self._limits = request_bytes

    def watch(self) -> None:
        """Shows what is held and what waits to whoever reads metrics."""
        telemetry.watch("hiprune.intake.held", lambda: self._held)
        self._parser.watch()

    @asynccontextmanager
    async def message(self, method: str, request: bytes, parse: Parse) -> AsyncIterator[Message]:
        """The request's message, counted among what is held until it is answered.

        Raises InvalidInput for one that is too large, has too many fields or cannot be parsed; Exhausted
        when too much is held.
        """
        size = len(request)
        most = self._limits.get(method, size)
        if size > most:
            raise InvalidInput(
                f"{size} bytes of request, expected at most {most}: what its fields can hold",
                reason="LIMIT_EXCEEDED",
            )
        owner = auth.current().tenant.name
        own, free = self._held_by.get(owner, 0) + size, self._max_held_bytes - self._held - size
        # no owner holds more than is left for the others: one alone half of all, two a third each
        if size and self._held and own > free:
            raise Exhausted(
                f"requests of {self._held} bytes are being served, {own - size} of them of this tenant's, "
                f"{size} more; at most {self._max_held_bytes}, and of one tenant's no more than stay free",
                retry_after_s=1,
            )
        with self._holding(owner, size):
            if size > _THREAD_BYTES:
                read = functools.partial(_read, method, request, parse)
                yield await self._parser.run(read, 1 + size // 2**20)
            else:
                yield _read(method, request, parse)

    @contextmanager
    def _holding(self, owner: str, size: int) -> Iterator[None]:
        self._held += size
        self._held_by[owner] = self._held_by.get(owner, 0) + size
        try:
            yield
        finally:
            self._held -= size
            left = self._held_by.pop(owner, 0) - size
            if left:
                self._held_by[owner] = left

    @contextmanager
    def answer(self, size: int) -> Iterator[None]:
        """An answer of so many bytes is being sent: counted among what is held, refused never.

        A client that does not read its answers keeps us from taking more requests, not from memory.
        """
        with self._holding(auth.current().tenant.name, size):
            yield


def check_fields(data: bytes, kind: Descriptor, *, most: int) -> None:
    """Refuses a serialised `kind` of more than `most` fields, nested ones included; parses nothing.

    Raises InvalidInput, also for what is malformed: a parser would say so too, but only at the end.
    """
    count = 0
    waiting = [(0, len(data), kind)]
    try:
        while waiting:
            position, end, kind = waiting.pop()
            nested = _messages_of(kind)
            while position < end:
                count += 1
                if count > most:
                    raise InvalidInput(
                        f"more than {most} fields in {len(data)} bytes of request", reason="LIMIT_EXCEEDED"
                    )
                tag, position = _varint(data, position)
                match tag & 7:
                    case 0:
                        _, position = _varint(data, position)
                    case 1:
                        position += 8
                    case 2:
                        length, position = _varint(data, position)
                        inner = nested.get(tag >> 3)
                        if inner is not None:
                            waiting.append((position, position + length, inner))
                        position += length
                    case 3 | 4:  # a group begins or ends: of an unknown field, kept as bytes
                        pass
                    case 5:
                        position += 4
                    case _:
                        raise _no_message(data)
            if position > end:
                raise _no_message(data)
    except IndexError as error:  # ends within a number
        raise _no_message(data) from error


def _read(method: str, request: bytes, parse: Parse) -> Message:
    if len(request) > SMALL_REQUEST:
        most = max(MAX_FIELDS, len(request) // BYTES_A_FIELD)
        check_fields(request, _request_of(method), most=most)
    try:
        return parse(request)
    except DecodeError as error:
        raise _no_message(request) from error


def _no_message(request: bytes) -> InvalidInput:
    return InvalidInput(f"{len(request)} bytes that are no message of this method")


@functools.cache
def _request_of(method: str) -> Descriptor:
    """The request's type of a method, by its path `/package.Service/Method`."""
    name = method.removeprefix("/").replace("/", ".")
    found: Descriptor = descriptor_pool.Default().FindMethodByName(name).input_type
    return found


@functools.cache
def _messages_of(kind: Descriptor) -> Mapping[int, Descriptor]:
    """The fields of a message that hold messages, by number."""
    found = {}
    for field in kind.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            found[field.number] = field.message_type
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number, and where it ends. Raises IndexError where the data do first."""
    byte = data[position]
    position += 1
    if byte < 0x80:
        return byte, position
    number = byte & 0x7F
    for shift in range(7, 70, 7):
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise IndexError("a number of more than ten bytes")
