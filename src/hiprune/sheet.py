"""A contact sheet: one image under several methods (rows) and budgets (columns), each with what was kept.

Draws what it is given. Knows no service and no policy.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageDraw

from hiprune.overlay import COLOURS, draw_patches, open_upright
from hiprune.v1 import pruner_service_pb2

_TILE: Final = 336
"""Pixels of a picture's longer side."""
_GAP: Final = 20
_MARGIN: Final = 32
_MEANINGS: Final = {
    "anchor": "shows an object",
    "buffer": "lies beside an anchor",
    "register": "sums up the scene",
    "text": "is like the question",
    "control": "by chance, or at even steps",
    "dominant": "CLS attends to it",
    "diverse": "is unlike the others kept",
}
"""Why a token of each kind was kept."""
_OTHER: Final = "#b3400a"
_CAPTION: Final = 26
"""Height of a line below a picture."""
_LONGEST: Final = 1000
"""Characters of a line that are looked at."""
_LINE: Final = 30
"""And of one of the legend."""
_INK: Final = "#1a1a1a"
_GREY: Final = "#6b6b6b"
_RULE: Final = "#d9d9d9"


@dataclass(frozen=True, slots=True)
class Tile:
    """One method at one budget."""

    view: pruner_service_pb2.Selection
    tokens_before: int
    tokens_kept: int
    answer: str | None = None
    """None: nothing was asked."""
    agrees: bool | None = None
    """Whether it is the answer that all tokens give; None: not known."""
    tiled: bool = False
    """Whether the view is the whole of an image in tiles, squeezed into the grid."""


def draw_sheet(
    image: bytes,
    tiles: Mapping[tuple[str, str], Tile],
    *,
    methods: Sequence[str],
    keeps: Sequence[str],
    title: str,
    question: str = "",
    whole: Tile | None = None,
) -> Image.Image:
    """An RGB picture of `tiles` by (method, keep), and on its left the image itself, unpruned.

    `whole` is what all tokens gave.
    """
    sample = next(iter(tiles.values()))
    width, height = draw_patches(image, sample.view, _TILE, tiled=sample.tiled).size
    answers = sample.answer is not None
    step_x, step_y = width + _GAP, height + (1 + answers) * _CAPTION + _GAP
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label = math.ceil(max(ruler.textlength(each, font_size=20) for each in methods)) + 2 * _GAP
    rule = _MARGIN + (76 if question else 46)
    top, left = rule + 46, _MARGIN + step_x + label
    legend = top + step_y + _GAP
    entries = _legend(tiles)
    bottom = max(top + len(methods) * step_y, legend + len(entries) * _LINE)
    page = Image.new("RGB", (left + len(keeps) * step_x - _GAP + _MARGIN, bottom + _MARGIN - _GAP), "white")
    pen = ImageDraw.Draw(page)

    room = page.width - 2 * _MARGIN
    pen.text((_MARGIN, _MARGIN), fitted(pen, title, room, 26), fill=_INK, font_size=26)
    if question:
        pen.text((_MARGIN, _MARGIN + 38), fitted(pen, f"“{question}”", room, 20), fill=_GREY, font_size=20)
    pen.line((_MARGIN, rule, page.width - _MARGIN, rule), fill=_RULE, width=1)

    _draw_whole(page, pen, image, (width, height), (_MARGIN, top), whole)
    for number, (colour, name, meaning) in enumerate(entries):
        y = legend + number * _LINE
        pen.rectangle((_MARGIN, y - 7, _MARGIN + 14, y + 7), fill=colour)
        pen.text((_MARGIN + 24, y), name, fill=_INK, font_size=17, anchor="lm")
        x = _MARGIN + 24 + math.ceil(pen.textlength(name, font_size=17)) + 8
        pen.text((x, y), fitted(pen, meaning, width + _MARGIN - x, 16), fill=_GREY, font_size=16, anchor="lm")
    for column, keep in enumerate(keeps):
        middle = left + column * step_x + width // 2
        pen.text((middle, top - 12), _budget(keep), fill=_INK, font_size=18, anchor="ms")
    for row, method in enumerate(methods):
        y = top + row * step_y
        pen.text((left - 16, y + height // 2), method, fill=_INK, font_size=20, anchor="rm")
        for column, keep in enumerate(keeps):
            tile = tiles.get((method, keep))
            if tile is not None:
                x = left + column * step_x
                page.paste(draw_patches(image, tile.view, _TILE, tiled=tile.tiled), (x, y))
                _caption(pen, tile, (x, y + height), width)
    return page


def fitted(pen: ImageDraw.ImageDraw, text: str, width: int, size: int) -> str:
    """The text on one line, cut where it is wider than `width` pixels."""
    text = " ".join(text[:_LONGEST].split())
    if pen.textlength(text, font_size=size) <= width:
        return text

    def width_of(count: int) -> int:
        return math.ceil(pen.textlength(text[:count] + "…", font_size=size))

    room = bisect_right(range(len(text) + 1), width, key=width_of)
    return text[: max(0, room - 1)].rstrip() + "…"


def _draw_whole(
    page: Image.Image,
    pen: ImageDraw.ImageDraw,
    image: bytes,
    size: tuple[int, int],
    at: tuple[int, int],
    whole: Tile | None,
) -> None:
    """The image itself, in its own shape within a tile, with what all of its tokens gave."""
    picture = open_upright(image)
    scale = min(size[0] / picture.width, size[1] / picture.height)
    shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    shown = picture.resize(shape, Image.Resampling.LANCZOS)
    x, y = at
    page.paste(shown, (x, y))
    pen.rectangle((x, y, x + shape[0] - 1, y + shape[1] - 1), outline=_RULE)
    pen.text((x + shape[0] // 2, y - 12), "the image", fill=_INK, font_size=18, anchor="ms")
    if whole is not None:
        _caption(pen, whole, (x, y + shape[1]), size[0])


def _caption(pen: ImageDraw.ImageDraw, tile: Tile, at: tuple[int, int], width: int) -> None:
    """Below a picture: how many tokens, and the answer."""
    x, y = at
    share = tile.tokens_kept / tile.tokens_before if tile.tokens_before else 0.0
    if tile.tokens_kept == tile.tokens_before:
        count = f"all {tile.tokens_before} tokens"
    else:
        count = f"{tile.tokens_kept} of {tile.tokens_before} tokens, {share:.0%}"
    pen.text((x, y + 17), count, fill=_GREY, font_size=16, anchor="lm")
    if tile.answer is not None:
        colour, mark = (_OTHER, "other: ") if tile.agrees is False else (_INK, "")
        text = fitted(pen, f"{mark}{tile.answer.strip() or '(nothing)'}", width, 19)
        pen.text((x, y + 17 + _CAPTION), text, fill=colour, font_size=19, anchor="lm")


def _legend(tiles: Mapping[tuple[str, str], Tile]) -> list[tuple[str, str, str]]:
    """Colour, name and meaning of what is on the sheet."""
    there = {kind for tile in tiles.values() for kind in tile.view.kinds}
    found = [
        (colour, name, _MEANINGS.get(name, "")) for kind, (name, colour) in COLOURS.items() if kind in there
    ]
    if any(tile.agrees is False for tile in tiles.values()):
        found.append((_OTHER, "other:", "not what all tokens answer"))
    return found


def _budget(keep: str) -> str:
    """A column's heading."""
    is_count = keep.isdigit()
    return f"{keep} tokens" if is_count else f"{keep} kept"
