"""What the included model is examined on: held-out scenes, their pictures and questions. Knows no model.

A sheet follows from a seed and a number. Its seeds are none that training learns from or looks at, so that
no checkpoint was chosen by these questions.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.shapes.batches import HELD_OUT
from models.shapes.questions import TYPES, Question, questions
from models.shapes.scenes import Scene, render, scene

FIRST_SEED: Final = HELD_OUT + 1
"""The held-out seed before it is what training looks at while it runs."""
_COVERED: Final = 0.25
"""Least share of a token's pixels that a thing covers for the token to show it; see `scenes.patch_owners`."""


@dataclass(frozen=True)
class Sheet:
    """One picture and what is asked about it, no question twice."""

    number: int
    scene: Scene
    image: bytes
    """A PNG, as a client would send it."""
    owners: npt.NDArray[np.int64]  # (SIDE, SIDE): 0 no thing, 1 the first
    questions: tuple[Question, ...]


def sheet(seed: int, number: int, each: int) -> Sheet:
    """Sheet `number` of a seed from 0 on, with up to `each` questions of every type."""
    made = scene(FIRST_SEED + seed, number)
    picture, owners = render(made)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    asked = questions(made, each * len(TYPES), np.random.default_rng([*made.number, 2]))
    distinct = {question.text: question for question in reversed(asked)}
    return Sheet(number, made, file.getvalue(), owners, tuple(reversed(distinct.values())))


def token_owners(owners: npt.NDArray[np.int64], grid: tuple[int, int]) -> npt.NDArray[np.int64]:
    """For each token of a grid (H, W) over the picture the thing that covers most of it, row-major (N,).

    0 where none covers a quarter. Where the grid is the one that scenes are drawn for, this is
    `scenes.patch_owners`.
    """
    height, width = grid
    # pixels are repeated until the grid divides them, so that a token's share of a pixel counts as a share
    down, across = (size // math.gcd(side, size) for side, size in zip(owners.shape, grid, strict=True))
    fine = np.repeat(np.repeat(owners, down, axis=0), across, axis=1)
    blocks = fine.reshape(height, fine.shape[0] // height, width, fine.shape[1] // width)
    things = int(owners.max())
    if not things:
        return np.zeros(height * width, dtype=np.int64)
    covered = np.stack([(blocks == order).mean(axis=(1, 3)) for order in range(1, things + 1)])  # (T, H, W)
    shown = np.where(covered.max(0) >= _COVERED, covered.argmax(0) + 1, 0)
    return shown.reshape(height * width).astype(np.int64)
