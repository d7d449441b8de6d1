"""The picture that people would rather look at: kept patches in the colour of their kind, the rest dimmed."""

from __future__ import annotations

from io import BytesIO
from typing import Final

from PIL import Image, ImageDraw, ImageOps

from hiprune.v1 import pruner_service_pb2

# Okabe and Ito's palette: told apart with every common kind of colour blindness
COLOURS: Final[dict[pruner_service_pb2.TokenKind.ValueType, tuple[str, str]]] = {
    pruner_service_pb2.TOKEN_KIND_ANCHOR: ("anchor", "#D55E00"),
    pruner_service_pb2.TOKEN_KIND_BUFFER: ("buffer", "#E69F00"),
    pruner_service_pb2.TOKEN_KIND_REGISTER: ("register", "#0072B2"),
    pruner_service_pb2.TOKEN_KIND_TEXT: ("text", "#CC79A7"),
    pruner_service_pb2.TOKEN_KIND_CONTROL: ("control", "#009E73"),
    pruner_service_pb2.TOKEN_KIND_DOMINANT: ("dominant", "#56B4E9"),
    pruner_service_pb2.TOKEN_KIND_DIVERSE: ("diverse", "#F0E442"),
}
_SIDE: Final = 672
_LEGEND: Final = 40


def draw_overlay(
    image: bytes, view: pruner_service_pb2.Selection, *, tiled: bool = False, views: int = 1
) -> Image.Image:
    """An RGB picture, the longer side about 672 pixels, of one view's kept patches over its image.

    The image is shown as the encoder sees it: scaled so that the grid covers it or, as the first view of a
    `tiled` one, squeezed into the grid. Below it each kind's colour, name and count and, where it is the
    first of several `views`, that it is.
    """
    return _with_legend(draw_patches(image, view, _SIDE, tiled=tiled), view, describe(views, tiled=tiled))


def describe(views: int, *, tiled: bool) -> str:
    """Which view is drawn, where there are several: the first."""
    if views < 2:
        return ""
    return f"view 1 of {views}" + (": the whole image, its tiles are not drawn" if tiled else "")


def draw_patches(
    image: bytes, view: pruner_service_pb2.Selection, side: int, *, tiled: bool = False
) -> Image.Image:
    """The same without the lines below: the longer side at most `side` pixels, a whole number to a patch."""
    rows, columns = view.grid_height, view.grid_width
    picture = open_upright(image)
    if not tiled:
        # the fixed-grid encoders take the centre crop whose shape is the grid's
        picture = _centre_crop(picture, columns / rows)
    cell = max(1, side // max(rows, columns))
    size = (columns * cell, rows * cell)
    bright = picture.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.blend(bright, Image.new("RGB", size, "white"), 0.72)
    tint = ImageDraw.Draw(canvas)
    for index, kind in zip(view.kept_indices, view.kinds, strict=True):
        row, column = divmod(index, columns)
        box = (column * cell, row * cell, (column + 1) * cell, (row + 1) * cell)
        canvas.paste(bright.crop(box), box)
        edge = (box[0], box[1], box[2] - 1, box[3] - 1)
        tint.rectangle(edge, outline=COLOURS[kind][1], width=max(1, cell // 12))
    return canvas


def open_upright(image: bytes) -> Image.Image:
    """An encoded image as the encoder reads it: upright, RGB, on white where it is transparent."""
    with Image.open(BytesIO(image)) as opened:
        layer = ImageOps.exif_transpose(opened).convert("RGBA")
    picture = Image.new("RGB", layer.size, "white")
    picture.paste(layer, mask=layer)
    return picture


def _centre_crop(picture: Image.Image, aspect: float) -> Image.Image:
    width, height = picture.size
    if width / height > aspect:
        cut = round(height * aspect)
        left = (width - cut) // 2
        return picture.crop((left, 0, left + cut, height))
    cut = round(width / aspect)
    top = (height - cut) // 2
    return picture.crop((0, top, width, top + cut))


def _with_legend(canvas: Image.Image, view: pruner_service_pb2.Selection, note: str) -> Image.Image:
    """The canvas with a line below it: each kind's colour, name and count; the note, if any, below that."""
    page = Image.new("RGB", (canvas.width, canvas.height + (2 if note else 1) * _LEGEND), "white")
    page.paste(canvas, (0, 0))
    pen = ImageDraw.Draw(page)
    middle = canvas.height + _LEGEND // 2
    left = 10
    for kind, (name, colour) in COLOURS.items():
        count = list(view.kinds).count(kind)
        if not count:
            continue
        pen.rectangle((left, middle - 7, left + 14, middle + 7), fill=colour)
        text = f"{name} {count}"
        pen.text((left + 21, middle), text, fill="black", font_size=15, anchor="lm")
        left += 21 + round(pen.textlength(text, font_size=15)) + 22
    total = f"{len(view.kept_indices)} of {view.grid_height * view.grid_width} tokens"
    pen.text((canvas.width - 10, middle), total, fill="black", font_size=15, anchor="rm")
    pen.text((10, middle + _LEGEND), note, fill="black", font_size=15, anchor="lm")
    return page
