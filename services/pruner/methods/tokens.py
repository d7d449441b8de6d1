"""One view's tokens as a method sees them. Knows no method and no wire message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hiprune.errors import InvalidInput
from services.pruner.selection import Mask, Scores


@dataclass(frozen=True, slots=True)
class Tokens:
    """N tokens of one view, row-major over an H×W grid. What the method does not read is None."""

    count: int
    """N = H·W."""
    width: int
    """W."""
    valid: Mask | None = None  # (N,) bool, False where a token lies wholly in padding; None: all valid
    object_scores: Scores | None = None  # (N,) float32
    deep_scores: Scores | None = None  # (N,) float32
    cls_scores: Scores | None = None  # (N,) float32: attention from CLS in the deep layer
    similarity: Scores | None = None  # (N,) float32: cosine with the question; None also without one
    features: npt.NDArray[np.floating[Any]] | None = None  # (N, D)
    seed: bytes = b""
    """A digest of the view, for what is drawn."""
    is_wanted: Callable[[], bool] = lambda: True
    """Whether anybody still waits; what takes long asks now and then, and raises Unwanted."""


class Unwanted(Exception):
    """Nobody waits for the selection any more, so nobody sees this."""


def required(found: npt.NDArray[Any] | None, field: str) -> npt.NDArray[Any]:
    """What a method cannot do without. Raises InvalidInput (`field`)."""
    if found is None:
        raise InvalidInput("is missing, and the method reads it", field=field, reason="MISSING_FIELD")
    return found
