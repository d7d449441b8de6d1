"""How an answer is drawn: the wire's `Sampling`, checked, with its defaults. Knows no model and no engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from hiprune.errors import InvalidInput
from hiprune.v1 import llm_service_pb2

DEFAULT_MAX_TOKENS: Final = 256
MAX_TEMPERATURE: Final = 2.0
MAX_STOPS: Final = 8
MAX_STOP_CHARS: Final = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """One request's sampling."""

    max_tokens: int | None = None
    """Most tokens to generate; None: DEFAULT_MAX_TOKENS, or what the service or the context leaves."""
    temperature: float = 0.0
    """0 is greedy: the likeliest token each time."""
    top_p: float = 1.0
    seed: int | None = None
    """None: a new one for each request."""
    stop: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def tokens_within(self, room: int, ceiling: int) -> int:
        """Most tokens to generate where the context leaves `room` and the service allows `ceiling`."""
        wanted = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return min(wanted, room, ceiling)


def read_sampling(message: llm_service_pb2.Sampling, *, max_new_tokens: int) -> Sampling:
    """The request's sampling. Raises InvalidInput naming `sampling.X`, the value and the bound."""
    return Sampling(
        max_tokens=_max_tokens(message, max_new_tokens),
        temperature=_temperature(message),
        top_p=_top_p(message),
        seed=message.seed if message.HasField("seed") else None,
        stop=_stop(message),
    )


def _max_tokens(message: llm_service_pb2.Sampling, ceiling: int) -> int | None:
    if not message.HasField("max_tokens"):
        return None
    if message.max_tokens < 1:
        raise InvalidInput(
            f"is {message.max_tokens}, expected at least 1 and at most {ceiling}", field="sampling.max_tokens"
        )
    if message.max_tokens > ceiling:
        raise InvalidInput(
            f"is {message.max_tokens}, expected at most {ceiling}, this service's max_new_tokens",
            reason="LIMIT_EXCEEDED",
            field="sampling.max_tokens",
        )
    return message.max_tokens


def _temperature(message: llm_service_pb2.Sampling) -> float:
    # written so that NaN, which fails every comparison, is refused
    if not 0 <= message.temperature <= MAX_TEMPERATURE:
        raise InvalidInput(
            f"is {message.temperature}, expected a number in [0, {MAX_TEMPERATURE:g}]",
            field="sampling.temperature",
        )
    return math.fabs(message.temperature)  # -0.0 is 0


def _top_p(message: llm_service_pb2.Sampling) -> float:
    if not message.HasField("top_p"):
        return 1.0
    if not 0 < message.top_p <= 1:
        raise InvalidInput(f"is {message.top_p}, expected a number in (0, 1]", field="sampling.top_p")
    return message.top_p


def _stop(message: llm_service_pb2.Sampling) -> tuple[str, ...]:
    if len(message.stop) > MAX_STOPS:
        raise InvalidInput(
            f"has {len(message.stop)} strings, expected at most {MAX_STOPS}",
            reason="LIMIT_EXCEEDED",
            field="sampling.stop",
        )
    for index, text in enumerate(message.stop):
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidInput(
                f"has {len(text)} characters, expected 1 to {MAX_STOP_CHARS}", field=f"sampling.stop[{index}]"
            )
    return tuple(message.stop)
