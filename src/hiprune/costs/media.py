"""What an image or a video becomes in each family: its views, their tokens, and what the prompt adds to them.

From sizes alone, in the families' own arithmetic. Pure; knows no pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from hiprune.anyres import tiling
from hiprune.costs.shapes import Grid, filled
from hiprune.errors import InvalidInput
from hiprune.families import Facts, UnsupportedModel
from hiprune.families.video_llava import FRAMES

PIXEL_BOUNDS: Final = (3136, 12_845_056)
"""Least and most pixels of an image in Qwen2.5-VL's published preprocessor_config.json."""
_MOST_STRETCHED: Final = 200
_SHRINKS_ABOVE: Final = 1.1  # stock's own threshold, see `services.llm.anyres`
_PINPOINTS: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {
    "llava_next": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    "llava_onevision": tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)),
}
"""What transformers takes where a config.json has no `image_grid_pinpoints`."""


@dataclass(frozen=True, slots=True)
class Media:
    """An image, or a video of `frames` frames of one size."""

    height: int = 336
    width: int = 336
    frames: int | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What the model sees of one media item."""

    grids: tuple[Grid, ...]
    """H, W of each view."""
    valid: tuple[int, ...]
    """Tokens of each view that are not padding."""
    prefix: int = 0
    """Tokens of each view outside its grid that go on to the language model."""
    whole_rows: int = 0
    """Rows that it makes in the prompt where nothing is pruned: with newlines, and shrunk as stock does."""

    @property
    def counts(self) -> list[int]:
        """Tokens of each view, as budgets count them."""
        return [self.prefix + count for count in self.valid]


def seen(
    config: Mapping[str, Any], facts: Facts, media: Media, *, pixel_bounds: tuple[int, int] = PIXEL_BOUNDS
) -> Seen:
    """The views of one media item. `pixel_bounds` are Qwen2.5-VL's, of its image processor.

    Raises InvalidInput (`image`, `frames`), UnsupportedModel.
    """
    if min(media.height, media.width) < 1:
        raise InvalidInput(f"{media.width}x{media.height}; expected at least 1x1 pixels", field="image")
    if media.frames is not None:
        if not facts.takes_video:
            raise InvalidInput(f"the {facts.family} family takes images, not video", field="frames")
        if media.frames < 1:
            raise InvalidInput(f"{media.frames}; expected at least 1", field="frames")
    if facts.family == "qwen2_5_vl":
        return _qwen(config, media, pixel_bounds)
    if facts.grid is None:
        raise UnsupportedModel(f"the {facts.family} family has no fixed grid")
    if facts.family in _PINPOINTS:
        return _tiled(config, facts, facts.grid, media)
    views, prefix = (FRAMES, 1) if media.frames is not None else (1, 0)
    count = facts.grid[0] * facts.grid[1]
    return Seen((facts.grid,) * views, (count,) * views, prefix, views * (count + prefix))


def _qwen(config: Mapping[str, Any], media: Media, bounds: tuple[int, int]) -> Seen:
    """One view for an image, one for each temporal slice of a video."""
    vision = filled(config["vision_config"], "qwen2_5_vl_vision")
    factor = int(vision["patch_size"]) * int(vision["spatial_merge_size"])
    height, width = resized(media.height, media.width, factor, bounds)
    grid = (height // factor, width // factor)
    slices = 1 if media.frames is None else math.ceil(media.frames / int(vision["temporal_patch_size"]))
    count = grid[0] * grid[1]
    return Seen((grid,) * slices, (count,) * slices, whole_rows=slices * count)


def resized(height: int, width: int, factor: int, bounds: tuple[int, int]) -> tuple[int, int]:
    """Multiples of `factor` nearest to an image's sides, its pixels within bounds: stock's `smart_resize`.

    Raises InvalidInput (`image`).
    """
    if max(height, width) > _MOST_STRETCHED * min(height, width):
        raise InvalidInput(
            f"{width}x{height}; expected sides of a ratio of at most {_MOST_STRETCHED}", field="image"
        )
    least, most = bounds
    down, across = (round(side / factor) * factor for side in (height, width))
    if down * across > most:
        scale = math.sqrt(height * width / most)
        down, across = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif down * across < least:
        scale = math.sqrt(least / (height * width))
        down, across = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return down, across


def _tiled(config: Mapping[str, Any], facts: Facts, grid: Grid, media: Media) -> Seen:
    """A base view and its tiles; whole, the tiles without padding and a newline behind each row."""
    kind = "siglip_vision_model" if facts.family == "llava_onevision" else "clip_vision_model"
    tile = int(filled(config["vision_config"], kind)["image_size"])
    pinpoints = config.get("image_grid_pinpoints") or _PINPOINTS[facts.family]
    tiles = tiling(media.height, media.width, pinpoints, tile=tile, side=grid[0])
    base = grid[0] * grid[1]
    height, width = tiles.shown[2:]
    largest = re.fullmatch(r"anyres_max_(\d+)", str(config.get("vision_aspect_ratio", "anyres_max_9")))
    if facts.family == "llava_onevision" and largest is not None:
        ratio = math.sqrt(height * width / (int(largest[1]) * base))
        if ratio > _SHRINKS_ABOVE:
            height, width = int(height // ratio), int(width // ratio)
    return Seen(
        (grid,) * (1 + len(tiles.valid)),
        (base, *(each[2] * each[3] for each in tiles.valid)),
        whole_rows=base + height * (width + 1),
    )
