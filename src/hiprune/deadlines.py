"""The deadline of the request being served, and what is left of it for the next hop. Knows no gRPC.

grpc.aio does not pass a deadline on by itself: the server interceptor sets it here, the client reads it.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Final

from hiprune.errors import Expired

HOP_MARGIN_S: Final = 0.02
"""What each hop keeps back, so that it can still answer when the next one runs out of time."""

_deadline: ContextVar[float | None] = ContextVar("hiprune_deadline", default=None)


def begin(remaining_s: float) -> None:
    """Sets the deadline of the current request, `remaining_s` seconds from now."""
    _deadline.set(time.monotonic() + remaining_s)


def clear() -> None:
    """Forgets the deadline: for work that outlives the request that began it."""
    _deadline.set(None)


def remaining_s() -> float | None:
    """Seconds left, below zero when past; None outside a request."""
    deadline = _deadline.get()
    return None if deadline is None else deadline - time.monotonic()


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
