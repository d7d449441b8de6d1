"""How many inputs a claim is tried on: a share in `make test`, all in `make test-all`, more in `make fuzz`.

The first two are the same inputs in every run. `make fuzz` draws new ones, and keeps what fails in
.hypothesis, to be tried first the next time; what it finds becomes a test with a name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import hypothesis
import pytest

INPUTS: Final = {
    "image files": 4500,
    "tensors": 1500,
    "cache values": 700,
    "requests before they are parsed": 1200,
    "settings": 500,
    "tenants files": 500,
    "PruneTokens": 1500,
    "PruneImage": 600,
    "EncodeImage": 600,
    "GenerateText": 500,
    "AskImage": 500,
    "bytes instead of requests": 500,
}
"""How many of each kind `make test-all` tries."""

_SHARE: Final = 8
"""`make test` tries one in so many."""
_LONGER: Final = int(os.environ.get("HIPRUNE_FUZZ", "0"))
"""How many times as many `make fuzz` tries; 0: this is not `make fuzz`."""

amounts = pytest.mark.parametrize(
    "amount",
    [pytest.param("a share", id="share"), pytest.param("all", id="all", marks=pytest.mark.extra)],
)
"""For a test whose argument `amount` goes to `tried_on`."""


def tried_on(kind: str, amount: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a claim that hypothesis gives its inputs."""
    number = INPUTS[kind]
    if amount == "a share":
        number //= _SHARE
    return hypothesis.settings(
        max_examples=number * max(1, _LONGER),
        derandomize=not _LONGER,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=True,
    )
