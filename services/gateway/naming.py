"""What a client calls the fields of the request that was made of its own: the llm's errors name the latter.

Knows both forms of a request; knows no value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from services.gateway.chat import ChatRequest

_PART: Final = re.compile(r"messages\[(\d+)\]\.parts(?:\[(\d+)\])?(?:\.(text|media).*)?")


@dataclass(frozen=True, slots=True)
class Naming:
    """What the client calls the fields of the AskImage request that was made of its own.

    Holds nothing of its words and images: it lives as long as the answer takes.
    """

    in_parts: tuple[bool, ...]
    """Of each message, whether its content came in parts."""
    max_tokens: str
    """The name that it used."""
    one_stop: bool
    """It sent a string, and no array of them."""

    @classmethod
    def of(cls, chat: ChatRequest) -> Naming:
        """The names of one request."""
        return cls(
            in_parts=tuple(isinstance(message.content, list) for message in chat.messages),
            max_tokens="max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens",
            one_stop=isinstance(chat.stop, str),
        )

    def __call__(self, field: str) -> str:
        """The client's name of a field; the field itself when it has none."""
        if found := _PART.fullmatch(field):
            index, number, kind = int(found[1]), found[2], found[3]
            content = f"messages[{index}].content"
            if number is None or index >= len(self.in_parts) or not self.in_parts[index]:
                return content
            return f"{content}[{number}].{'image_url.url' if kind == 'media' else 'text'}"
        head, _, rest = field.partition(".")
        if head == "sampling" and rest == "max_tokens":
            return self.max_tokens
        if head == "sampling" and rest.startswith("stop") and self.one_stop:
            return "stop"
        if head == "sampling" and rest:
            return rest
        if head == "policy":
            rest = "keep" if rest in ("keep_count", "keep_ratio") else rest
            return f"pruning.{rest}" if rest else "pruning"
        return field
