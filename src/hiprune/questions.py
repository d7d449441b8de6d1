"""What is asked, as the wire has it: a user's turn of media and words, a video, how an answer is drawn."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from hiprune.errors import InvalidInput
from hiprune.v1 import llm_service_pb2, media_pb2

Made = TypeVar("Made", bound=Message)


def question_message(question: str, media: Sequence[bytes | media_pb2.Media]) -> llm_service_pb2.Message:
    """A user's turn: the encoded images and other media, then the words. Raises InvalidInput."""
    parts = [llm_service_pb2.Part(media=media_of(each, f"media[{i}]")) for i, each in enumerate(media)]
    if question:
        try:
            parts.append(llm_service_pb2.Part(text=question))
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"got {reprlib.repr(question)}: {error}", field="question") from error
    return llm_service_pb2.Message(role=llm_service_pb2.ROLE_USER, parts=parts)


def media_of(item: bytes | media_pb2.Media, field: str = "media") -> media_pb2.Media:
    """An encoded image, or a `video`, as the wire has both. Raises InvalidInput for anything else."""
    if isinstance(item, media_pb2.Media):
        return item
    if isinstance(item, bytes | bytearray | memoryview):
        return media_pb2.Media(image=bytes(item))
    raise InvalidInput(
        f"got {type(item).__name__}, expected the bytes of a JPEG, PNG, WebP or GIF file, or a video",
        field=field,
    )


def video(frames: Iterable[bytes], frames_per_second: float | None = None) -> media_pb2.Media:
    """A video of encoded images, in time order and of one size, sampled at a rate; None: the service's 2.

    Raises InvalidInput for what the wire cannot hold.
    """
    return media_pb2.Media(
        video=made(media_pb2.Video, frames=list(frames), frames_per_second=frames_per_second)
    )


def sampling(
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> llm_service_pb2.Sampling:
    """How an answer is drawn. What is left out is the service's default: the likeliest token, up to 256
    times.

    max_tokens: most tokens of the answer. temperature: 0 takes the likeliest token each time. top_p: draw
    from the likeliest tokens that together hold this probability. seed: makes a draw repeatable. stop:
    strings that end the answer and are no part of it. Raises InvalidInput for what the wire cannot hold.
    """
    drawn = made(llm_service_pb2.Sampling, stop=[stop] if isinstance(stop, str) else stop)
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    for name, value in given.items():
        if value is not None:
            try:
                setattr(drawn, name, value)
            except (TypeError, ValueError) as error:
                raise InvalidInput(f"got {value!r}, expected a number: {error}", field=name) from error
    return drawn


def made(kind: type[Made], *, at: str = "", **fields: Any) -> Made:
    """A message of these fields. Raises InvalidInput for what it cannot hold, which `at` and a name say."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except (TypeError, ValueError) as found:
                raise InvalidInput(f"got {reprlib.repr(value)}: {found}", field=f"{at}{name}") from found
        raise InvalidInput(str(error), field=at.rstrip(".: ")) from error
