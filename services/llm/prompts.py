"""A request's messages, checked, as token ids and the media that the image tokens among them stand for.

Pure: knows the wire's messages and a chat template; knows no weights, no pruner and no context length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from jinja2 import TemplateError

from hiprune.errors import InvalidInput, Unsupported
from hiprune.v1 import llm_service_pb2, media_pb2
from services.llm.chat import Chat

_ROLES: Final = {
    llm_service_pb2.ROLE_SYSTEM: "system",
    llm_service_pb2.ROLE_USER: "user",
    llm_service_pb2.ROLE_ASSISTANT: "assistant",
}
_MEDIA: Final = ("media", "pruned_media")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a conversation may hold; each is the setting of the same name."""

    max_messages: int
    max_media: int
    max_text_chars: int
    max_image_bytes: int = 20 * 2**20
    max_video_bytes: int = 64 * 2**20


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image or video of a conversation."""

    field: str
    """Path of its part in the request: `messages[0].parts[1]`."""
    part: llm_service_pb2.Part
    question: str
    """What it is pruned for: the user's words of its turn, else the next before any answer, else none."""
    question_field: str
    """Path of the message that those words are from; empty when there are none."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation, ready for its media."""

    token_ids: tuple[int, ...]
    """As the stock processor has them, but with a single image token for each media item."""
    media: tuple[MediaItem, ...]
    """What each image token stands for, in order."""


def read_prompt(
    messages: Sequence[llm_service_pb2.Message],
    chat: Chat,
    limits: Limits,
    *,
    media: Literal["media", "pruned_media"],
) -> Prompt:
    """The prompt of a request in which media come as `media` says: raw, or pruned before.

    Raises InvalidInput, or Unsupported for a video, naming the field, the value and the bound.
    """
    _check_turns(messages, chat, limits)
    _check_parts(messages, limits, media, chat.video_token_id is not None)
    for index, message in enumerate(messages):
        _check_reserved(index, message, chat)
    try:
        rendered = chat.render([_turn(message) for message in messages])
    except TemplateError as error:
        raise InvalidInput(f"the model's chat template refuses them: {error}", field="messages") from error
    token_ids = chat.encode(rendered)
    items = _media_items(messages)
    kinds = {chat.image_token_id: False, chat.video_token_id: True}
    placeholders = [kinds[token] for token in token_ids if token in kinds]
    if placeholders != [_is_video(item.part) for item in items]:
        raise InvalidInput(
            f"have {len(items)} media, the model's chat template makes {len(placeholders)} placeholders of "
            "them, or puts images and videos in another order",
            reason="RESERVED_TOKEN",
            field="messages",
        )
    return Prompt(tuple(token_ids), items)


def _check_turns(messages: Sequence[llm_service_pb2.Message], chat: Chat, limits: Limits) -> None:
    """Number and order of the turns."""
    if not messages:
        raise InvalidInput("is empty, expected at least 1 message", reason="MISSING_FIELD", field="messages")
    if len(messages) > limits.max_messages:
        raise InvalidInput(
            f"has {len(messages)} messages, expected at most {limits.max_messages}",
            reason="LIMIT_EXCEEDED",
            field="messages",
        )
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role not in _ROLES:
            raise InvalidInput(
                f"is {message.role}, expected ROLE_SYSTEM, ROLE_USER or ROLE_ASSISTANT",
                reason="INVALID_FIELD" if message.role else "MISSING_FIELD",
                field=f"{where}.role",
            )
        if message.role == llm_service_pb2.ROLE_SYSTEM and index > 0:
            raise InvalidInput("is ROLE_SYSTEM, legal in the first message only", field=f"{where}.role")
        if message.role == llm_service_pb2.ROLE_SYSTEM and not chat.takes_system:
            raise InvalidInput(
                "is ROLE_SYSTEM, but the model's chat template has no place for it", field=f"{where}.role"
            )
        if not message.parts:
            raise InvalidInput(
                "is empty, expected at least 1 part", reason="MISSING_FIELD", field=f"{where}.parts"
            )
    if messages[-1].role != llm_service_pb2.ROLE_USER:
        raise InvalidInput(
            f"is {llm_service_pb2.Role.Name(messages[-1].role)}, expected ROLE_USER in the last message",
            field=f"messages[{len(messages) - 1}].role",
        )


def _check_parts(
    messages: Sequence[llm_service_pb2.Message], limits: Limits, media: str, takes_video: bool
) -> None:
    """Kind, place and size of every part."""
    count = chars = 0
    for index, message in enumerate(messages):
        for number, part in enumerate(message.parts):
            where = f"messages[{index}].parts[{number}]"
            kind = part.WhichOneof("content")
            if kind is None:
                raise InvalidInput(f"is empty, expected text or {media}", reason="MISSING_FIELD", field=where)
            if kind == "text":
                chars += len(part.text)
                _check_text(message, part.text, chars, limits, f"{where}.text")
                continue
            if kind != media:
                raise InvalidInput(f"is not taken by this method, expected {media}", field=f"{where}.{kind}")
            if message.role != llm_service_pb2.ROLE_USER:
                raise InvalidInput(
                    f"is in a turn of {llm_service_pb2.Role.Name(message.role)}, legal in the user's only",
                    field=f"{where}.{kind}",
                )
            if kind == "media":
                _check_media(part.media, limits, takes_video, f"{where}.media")
            count += 1
            if count > limits.max_media:
                raise InvalidInput(
                    f"is media item {count} of the conversation, expected at most {limits.max_media}",
                    reason="LIMIT_EXCEEDED",
                    field=f"{where}.{kind}",
                )


def _check_text(message: llm_service_pb2.Message, text: str, chars: int, limits: Limits, where: str) -> None:
    # an earlier answer may have been empty, and a client sends it back as it was
    if not text and message.role != llm_service_pb2.ROLE_ASSISTANT:
        raise InvalidInput("is empty, expected at least 1 character", reason="MISSING_FIELD", field=where)
    if chars > limits.max_text_chars:
        raise InvalidInput(
            f"makes {chars} characters of text in the conversation, expected at most {limits.max_text_chars}",
            reason="LIMIT_EXCEEDED",
            field=where,
        )


def _check_media(media: media_pb2.Media, limits: Limits, takes_video: bool, where: str) -> None:
    match media.WhichOneof("content"):
        case None:
            raise InvalidInput("is empty, expected an image", reason="MISSING_FIELD", field=where)
        case "image":
            _check_size(len(media.image), limits.max_image_bytes, f"{where}.image")
        case "video" if not takes_video:
            raise Unsupported("this model's family takes images only", field=f"{where}.video")
        case _:
            frames = f"{where}.video.frames"
            total = 0
            for number, frame in enumerate(media.video.frames):
                _check_size(len(frame), limits.max_image_bytes, f"{frames}[{number}]")
                total += len(frame)
            _check_size(total, limits.max_video_bytes, frames)


def _check_size(size: int, most: int, field: str) -> None:
    """Here already, at the front door: what is too large is not sent on."""
    if size > most:
        raise InvalidInput(f"{size} bytes, expected at most {most}", reason="LIMIT_EXCEEDED", field=field)


def _check_reserved(index: int, message: llm_service_pb2.Message, chat: Chat) -> None:
    """Refuses text that would be read as the template's own tokens, in one part or over several."""
    texts = [(number, part.text) for number, part in enumerate(message.parts) if part.HasField("text")]
    # templates put a turn's texts one after the other, so a token could be made of two of them
    joined = "".join(text for _, text in texts)
    found = chat.reserved_in(joined)
    if not found:
        return
    begin = joined.find(found)
    end = begin + len(found) if begin >= 0 else len(joined)  # normalised: not there to the letter
    for number, text in texts:
        end -= len(text)
        if end <= 0:
            raise InvalidInput(
                f"contains {found!r}, a special token of the model",
                reason="RESERVED_TOKEN",
                field=f"messages[{index}].parts[{number}].text",
            )


def _turn(message: llm_service_pb2.Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    content: list[dict[str, str]] = []
    for part in message.parts:
        if part.WhichOneof("content") == "text":
            content.append({"type": "text", "text": part.text})
        else:
            content.append({"type": "video" if _is_video(part) else "image"})
    return {"role": _ROLES[message.role], "content": content}


def _is_video(part: llm_service_pb2.Part) -> bool:
    if part.WhichOneof("content") == "pruned_media":
        return part.pruned_media.layout.video
    return part.media.WhichOneof("content") == "video"


def _media_items(messages: Sequence[llm_service_pb2.Message]) -> tuple[MediaItem, ...]:
    """All media in the order of the conversation, each with the words it is pruned for."""
    items = []
    for index, message in enumerate(messages):
        media = [number for number, part in enumerate(message.parts) if part.WhichOneof("content") in _MEDIA]
        if not media:
            continue
        asked = _question_from(messages, index)
        question = "" if asked is None else _text_of(messages[asked])
        items += [
            MediaItem(
                field=f"messages[{index}].parts[{number}]",
                part=message.parts[number],
                question=question,
                question_field="" if asked is None else f"messages[{asked}]",
            )
            for number in media
        ]
    return tuple(items)


def _question_from(messages: Sequence[llm_service_pb2.Message], start: int) -> int | None:
    """Index of the first user's turn with text, from `start` on and before any answer; None without one."""
    for index in range(start, len(messages)):
        if messages[index].role != llm_service_pb2.ROLE_USER:
            return None
        if _text_of(messages[index]):
            return index
    return None


def _text_of(message: llm_service_pb2.Message) -> str:
    """The words of a turn as the template joins them, without the white space around them."""
    return "".join(part.text for part in message.parts if part.HasField("text")).strip()
