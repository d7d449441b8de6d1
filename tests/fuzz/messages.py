"""Requests drawn from their descriptors: any field, any kind of value, more often a value at an edge."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import google.protobuf.internal.encoder as wire
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from tests.fuzz.files import broken_files, whole_files

M = TypeVar("M", bound=Message)
Draw = Callable[[st.SearchStrategy[Any]], Any]

_SMALL: Final = st.integers(-2, 20)
_INT32: Final = st.sampled_from([0, 1, -1, 4, 7, 8, 14, 196, 197, 65_536, 2**31 - 1, -(2**31)])
_INT64: Final = st.sampled_from([0, 1, -1, 2, 14, 196, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)])
_DOUBLES: Final = (
    st.sampled_from(
        [0.0, -0.0, 1.0, 0.5, 1 / 3, 0.999, 1e-300, 5e-324, 1e308, 2.0, -1.0, 1e6]
        + [float(each) for each in ("nan", "inf", "-inf")]
    )
    | st.floats()
)
_FLOATS: Final = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 1e4, 1e9, 1e19, 1e20, 1e38, 3.4028235e38, -3.4028235e38]
    + [float(each) for each in ("nan", "inf", "-inf")]
)
_TEXTS: Final = st.sampled_from(
    [
        "",
        " ",
        "what colour is the square ?",
        "count the shapes .",
        "\0",
        "a\0b",
        "<image>",
        "<ima",
        "</s>",
        "\ufeff\u202e",
        "é" * 40,
        "\U0001f600" * 9,
        "\udfff".encode("utf-8", "replace").decode(),
        "{{ 7 * 7 }}",
        "{% raise %}",
        "shape " * 300,
        "x" * 33_000,
        "llava",
    ]
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def _integers(field: FieldDescriptor) -> st.SearchStrategy[int]:
    wide = field.type == FieldDescriptor.TYPE_INT64
    return _SMALL | _INT32 | _INT64 if wide else _SMALL | _INT32


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    match field.type:
        case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FLOAT:
            return _DOUBLES
        case FieldDescriptor.TYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.TYPE_ENUM:
            assert field.enum_type is not None
            known = [value.number for value in field.enum_type.values]
            return st.sampled_from([*known, *known, -1, 7, 99, 2**31 - 1])
        case FieldDescriptor.TYPE_STRING:
            return _TEXTS
        case FieldDescriptor.TYPE_BYTES:
            if field.name in {"image", "frames"}:
                return broken_files() | st.sampled_from(whole_files()) | st.binary(max_size=30)
            return st.binary(max_size=64) | st.integers(0, 300).map(lambda size: bytes(4 * size))
        case _:
            return _integers(field)


@st.composite
def messages(draw: Draw, kind: type[M]) -> M:
    """Any message of a kind: each field set or not, lists of up to three."""
    message = kind()
    _fill(draw, message)
    return message


def _fill(draw: Draw, message: Message) -> None:
    for field in message.DESCRIPTOR.fields:
        if draw(st.integers(0, 2)):
            _set(draw, message, field)


def _set(draw: Draw, message: Message, field: FieldDescriptor) -> None:
    """Gives one field a new value; a list one more element, or some."""
    if field.is_repeated:
        values = getattr(message, field.name)
        for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
            if field.message_type is not None:
                _fill(draw, values.add())
            else:
                values.append(draw(_scalar(field)))
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        inner.SetInParent()
        _fill(draw, inner)
    else:
        setattr(message, field.name, draw(_scalar(field)))


@st.composite
def nearly(draw: Draw, right: Sequence[M]) -> M:
    """One of some right messages, after one accident anywhere in it, or a few."""
    chosen = draw(st.sampled_from(right))
    message = type(chosen)()
    message.CopyFrom(chosen)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        places = list(_places(message))
        _accident(draw, *places[draw(st.integers(0, len(places) - 1))])
    return message


def _places(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Every field, set or not, of a message and of what it holds."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else [value]:
                yield from _places(each)


def _accident(draw: Draw, message: Message, field: FieldDescriptor) -> None:
    what = draw(st.integers(0, 4))
    if field.name == "data" and what < 4:
        _change_numbers(draw, message)
        return
    if what == 0:
        message.ClearField(field.name)  # type: ignore[arg-type]
        return
    if not field.is_repeated:
        _set(draw, message, field)
        return
    values = getattr(message, field.name)
    if what == 1 or not len(values):
        _set(draw, message, field)
        return
    place = draw(st.integers(0, len(values) - 1))
    if what == 2:
        del values[place]
    elif field.message_type is not None:
        many = 300 if values[place].ByteSize() < 10_000 else 3
        values.extend([values[place]] * draw(st.sampled_from([1, 2, many])))
    elif what == 3:
        values[place] = draw(_scalar(field))
    else:
        values.extend([values[place]] * draw(st.sampled_from([1, 2, 3000])))


@st.composite
def unknown_fields(draw: Draw) -> bytes:
    """Serialised fields that no message of ours has, of every wire type: a parser keeps them."""
    number = draw(st.integers(1000, 2**29 - 1))
    kind = draw(st.integers(0, 4))
    match kind:
        case 0:
            body = wire._VarintBytes(draw(st.integers(0, 2**64 - 1)))
        case 1:
            body = draw(st.binary(min_size=8, max_size=8))
        case 2:
            content = draw(st.binary(max_size=30))
            body = wire._VarintBytes(len(content)) + content
        case 3:
            body = wire.TagBytes(7, 0) + b"\1" + wire.TagBytes(number, 4)
        case _:
            return wire.TagBytes(number, 5) + draw(st.binary(min_size=4, max_size=4))
    return wire.TagBytes(number, kind) + body


def _change_numbers(draw: Draw, tensor: Any) -> None:
    """Other elements in a tensor, one of them or all, that are as many as before."""
    size = len(tensor.data)
    number = struct.pack("<f", draw(_FLOATS))
    begin = 4 * draw(st.integers(0, max(0, size // 4 - 1)))
    if draw(st.booleans()):
        tensor.data = (number * (size // 4 + 1))[:size]
    else:
        tensor.data = (tensor.data[:begin] + number + tensor.data[begin + 4 :])[:size]


@st.composite
def broken_bytes(draw: Draw, data: bytes) -> bytes:
    """Serialised bytes after one to three accidents."""
    broken = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(broken)))
        match draw(st.integers(0, 3)):
            case 0:
                broken[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del broken[place : place + draw(st.integers(1, 9))]
            case 2:
                broken[place:place] = draw(st.binary(min_size=1, max_size=12))
            case _:
                begin = draw(st.integers(0, len(broken)))
                broken[place:place] = broken[begin : begin + draw(st.integers(1, 60))]
    return bytes(broken)


def fields_of(kind: Descriptor, path: str) -> bool:
    """Whether a path such as `messages[0].parts[1].text` leads to a field of a kind of message."""
    descriptor: Descriptor | None = kind
    for step in path.split("."):
        name = step.partition("[")[0]
        if descriptor is None or name not in descriptor.fields_by_name:
            return False
        field = descriptor.fields_by_name[name]
        if field.is_repeated is False and "[" in step:
            return False
        descriptor = field.message_type
    return True
