"""The deadline of the request being served, and what is left of it for the next hop. Knows no gRPC.

grpc.aio does not pass a deadline on by itself: the server interceptor sets it here, the client reads it.
"""

from __future__ import annotations

import math
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from hiprune.errors import Expired

HOP_MARGIN_S: Final = 0.02
"""What each hop keeps back, so that it can still answer when the next one runs out of time."""


@dataclass(slots=True)
class Deadline:
    """When work must be done. Of work for several requests: when the last of them must be."""

    at_s: float
    """By the clock `time.monotonic`; infinity for one that never comes."""

    @classmethod
    def current(cls) -> Deadline:
        """A copy of the current request's, for work that may outlive it; outside of one it never comes."""
        now = _deadline.get()
        return cls(math.inf if now is None else now.at_s)

    def extend(self, other: Deadline) -> None:
        """Moves it to another's where that is later: for the work that is under way, too."""
        self.at_s = max(self.at_s, other.at_s)

    def enter(self) -> None:
        """Makes it the deadline of what is done from here on."""
        _deadline.set(self)


_deadline: ContextVar[Deadline | None] = ContextVar("hiprune_deadline", default=None)


def begin(remaining_s: float) -> None:
    """Sets the deadline of the current request, `remaining_s` seconds from now."""
    Deadline(time.monotonic() + remaining_s).enter()


def remaining_s() -> float | None:
    """Seconds left, below zero when past; None outside a request."""
    deadline = _deadline.get()
    return None if deadline is None or deadline.at_s == math.inf else deadline.at_s - time.monotonic()


def for_next_hop(default_s: float) -> float:
    """Timeout in seconds for a call made on behalf of the current request; `default_s` outside of one.

    Raises Expired when nothing worth starting is left.
    """
    left = remaining_s()
    if left is None:
        return default_s
    if left <= HOP_MARGIN_S:
        raise Expired(f"{max(left, 0) * 1000:.0f} ms are left of the deadline, too little for another hop")
    return left - HOP_MARGIN_S
