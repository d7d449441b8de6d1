"""Encoded bytes from strangers → an RGB image, or an error that says what is wrong with them.

Checks what is cheap first, so that a hostile image costs no more than reading its header: `inspect` goes
before `decode`, and allocates no pixel. Leaves Pillow's process-wide settings as they are, and gives it no
metadata to trip over. Knows nothing of models: resizing and normalising are the preprocessor's.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from hiprune import containers
from hiprune.containers import Outline
from hiprune.errors import InvalidInput

_MAX_SCANS: Final = 100
"""A progressive JPEG has about ten. Forty bytes of an empty scan cost a full pass over the pixels, so that
20 MB of them would decode for hours."""

_DECODERS: Final[dict[containers.Format, type[ImageFile.ImageFile]]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
}
"""By content. Not `Image.open`, which tries others too, and warns of large images that are within limits."""

_UPRIGHT: Final = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation; 1 is upright."""


@dataclass(frozen=True)
class ImageLimits:
    """The largest image that is decoded."""

    max_bytes: int  # encoded
    max_pixels: int  # width × height
    max_side: int  # pixels
    max_aspect: float = 200.0  # longer side / shorter side: resizing by the shorter one multiplies the longer


def decode_image(data: bytes, *, limits: ImageLimits, field: str) -> Image.Image:
    """The upright RGB image in `data`: JPEG, PNG, WebP or GIF by content; the first frame of an animation.

    Alpha is composited on white; 16-bit channels become 8-bit; colour profiles are ignored. Nothing behind
    the first frame is looked at. The result has no metadata, so nobody rotates it twice.

    Raises `InvalidInput` on `field`: MISSING_FIELD for no bytes, LIMIT_EXCEEDED beyond `limits`, before any
    pixel is decoded, and IMAGE_UNREADABLE for another format and for truncated or corrupt data.
    """
    return decode(inspect(data, limits=limits, field=field), field=field)


def inspect(data: bytes, *, limits: ImageLimits, field: str) -> Outline:
    """What an image's header says, once it is within `limits`. Decodes nothing. Raises as `decode_image`."""
    if not data:
        raise InvalidInput("no image", reason="MISSING_FIELD", field=field)
    if len(data) > limits.max_bytes:
        raise _too_large(f"{len(data)} bytes; at most {limits.max_bytes}", field)
    try:
        outline = containers.read(data)
    except containers.Excessive as error:
        raise _too_large(str(error), field) from error
    except containers.Damaged as error:
        raise InvalidInput(
            f"a truncated or corrupt image: {error}", reason="IMAGE_UNREADABLE", field=field
        ) from error
    if outline is None:
        raise InvalidInput("not a JPEG, PNG, WebP or GIF image", reason="IMAGE_UNREADABLE", field=field)
    width, height = outline.size
    if width * height > limits.max_pixels:
        raise _too_large(f"{width} × {height} pixels; at most {limits.max_pixels} in all", field)
    if max(width, height) > limits.max_side:
        raise _too_large(f"{width} × {height} pixels; at most {limits.max_side} a side", field)
    if max(width, height) > limits.max_aspect * min(width, height) > 0:
        raise _too_large(
            f"{width} × {height} pixels; at most {limits.max_aspect:g} times as long as wide", field
        )
    if outline.scans > _MAX_SCANS:
        raise _too_large(f"{outline.scans} scans; at most {_MAX_SCANS}", field)
    return outline


def decode(outline: Outline, *, field: str) -> Image.Image:
    """The image of an outline, as `decode_image` says. Raises `InvalidInput` (IMAGE_UNREADABLE)."""
    try:
        with _DECODERS[outline.format](io.BytesIO(outline.file)) as image:
            if image.size != (outline.box[2:] if outline.box else outline.size):
                raise ValueError("the decoder sees another size")
            image.load()
            return _upright_rgb(image, outline)
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder trips over, it is the bytes that are at fault
        message = f"a truncated or corrupt {outline.format} image"
        raise InvalidInput(message, reason="IMAGE_UNREADABLE", field=field) from error


def _upright_rgb(image: Image.Image, outline: Outline) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        key = image.info.get("transparency")
        image = image.point(lambda value: value / 257 + 0.5).convert("L")
        if key is not None:
            image.info["transparency"] = round(key / 257)
    mask = None
    if image.has_transparency_data:
        image = mask = image.convert("RGBA")
    left, top = outline.box[:2] if outline.box else (0, 0)
    if mask is not None or image.size != outline.size:
        canvas = Image.new("RGB", outline.size, "white")
        canvas.paste(image, (left, top), mask)
        image = canvas
    upright = image if image.mode == "RGB" else image.convert("RGB")  # which would copy
    if outline.orientation in _UPRIGHT:
        upright = upright.transpose(_UPRIGHT[outline.orientation])
    upright.info.clear()
    return upright


def _too_large(message: str, field: str) -> InvalidInput:
    return InvalidInput(message, reason="LIMIT_EXCEEDED", field=field)
