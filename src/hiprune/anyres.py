"""Images of any resolution as a base view and a grid of tiles: which tiles, and what of each is not padding.

The arithmetic of LLaVA-NeXT and LLaVA-OneVision, in transformers' own order of operations so that it rounds
alike (`select_best_resolution`, `unpad_image`); tests hold the two together. Knows no pixels and no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Pinpoints: TypeAlias = Sequence[Sequence[int]]
"""Canvases that an image may be fitted to: height and width in pixels, multiples of a tile's side."""

Rectangle: TypeAlias = tuple[int, int, int, int]
"""Top, left, height, width, in tokens."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles behind the base view of one image."""

    rows: int
    columns: int
    shown: Rectangle
    """What of the assembled tiles, (rows · side) × (columns · side) tokens, shows the image."""
    valid: tuple[Rectangle, ...]
    """The same for each tile by itself, in raster order; (0, 0, 0, 0) for a tile of padding alone."""


def tiling(height: int, width: int, pinpoints: Pinpoints, *, tile: int, side: int) -> Tiling:
    """The tiles of an image of `height` × `width` pixels; each has `tile`² pixels and `side`² tokens."""
    canvas = best_resolution(height, width, pinpoints)
    rows, columns = canvas[0] // tile, canvas[1] // tile
    shown = unpadded(height, width, rows * side, columns * side)
    valid = tuple(
        _inside(shown, row * side, column * side, side) for row in range(rows) for column in range(columns)
    )
    return Tiling(rows, columns, shown, valid)


def best_resolution(height: int, width: int, pinpoints: Pinpoints) -> tuple[int, int]:
    """The canvas, (height, width), on which most of an image's pixels survive, with the least padding.

    Raises ValueError without pinpoints.
    """
    best, most, least = None, 0, 0
    for canvas_height, canvas_width in pinpoints:
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas_height * canvas_width - effective
        if best is None or effective > most or (effective == most and wasted < least):
            best, most, least = (canvas_height, canvas_width), effective, wasted
    if best is None:
        raise ValueError("no pinpoints")
    return best


def unpadded(height: int, width: int, rows: int, columns: int) -> Rectangle:
    """What of a grid of `rows` × `columns` tokens an image of `height` × `width` pixels, centred, fills."""
    if width / height > columns / rows:
        scale = columns / width
        padding = (rows - int(round(height * scale, 7))) // 2
        return padding, 0, rows - 2 * padding, columns
    scale = rows / height
    padding = (columns - int(round(width * scale, 7))) // 2
    return 0, padding, rows, columns - 2 * padding


def _inside(shown: Rectangle, top: int, left: int, side: int) -> Rectangle:
    """The part of `shown` in the tile of `side`² tokens whose corner is at `top`, `left`; seen from there."""
    first_row, first_column = max(shown[0], top), max(shown[1], left)
    height = min(shown[0] + shown[2], top + side) - first_row
    width = min(shown[1] + shown[3], left + side) - first_column
    if height <= 0 or width <= 0:
        return 0, 0, 0, 0
    return first_row - top, first_column - left, height, width
