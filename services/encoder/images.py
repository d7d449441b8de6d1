"""Encoded bytes from strangers → an RGB image, or an error that says what is wrong with them.

Checks what is cheap first, so that a hostile image costs no more than reading its header. Leaves Pillow's
process-wide settings as they are, and drops all metadata once the orientation is applied. Knows nothing of
models: resizing and normalising are the preprocessor's.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Final

from PIL import ExifTags, Image, ImageFile
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from hiprune.errors import InvalidInput

_MAX_JPEG_SCANS: Final = 100
"""A progressive JPEG has about ten. Forty bytes of an empty scan cost a full pass over the pixels, so that
20 MB of them would decode for hours."""

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
    """The upright RGB image in `data`: JPEG, PNG or WebP by content; the first frame of an animation.

    Alpha is composited on white; 16-bit channels become 8-bit; colour profiles are ignored. The result has
    no metadata, so nobody rotates it twice.

    Raises `InvalidInput` on `field`: MISSING_FIELD for no bytes, LIMIT_EXCEEDED beyond `limits`, before any
    pixel is decoded, and IMAGE_UNREADABLE for another format and for truncated or corrupt data.
    """
    if not data:
        raise InvalidInput("no image", reason="MISSING_FIELD", field=field)
    if len(data) > limits.max_bytes:
        raise _too_large(f"{len(data)} bytes; at most {limits.max_bytes}", field)
    decoder = _decoder_for(data)
    if decoder is None:
        raise InvalidInput("not a JPEG, PNG or WebP image", reason="IMAGE_UNREADABLE", field=field)
    try:
        with decoder(io.BytesIO(data)) as image:
            _check_header(image, data, limits, field)
            image.load()
            return _upright_rgb(image)
    except (InvalidInput, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, where `limits` are wider still
        raise _too_large(f"more pixels than {decoder.format} is decoded for", field) from error
    except Exception as error:  # whatever a decoder trips over, it is the bytes that are at fault
        message = f"a truncated or corrupt {decoder.format} image"
        raise InvalidInput(message, reason="IMAGE_UNREADABLE", field=field) from error


def _decoder_for(data: bytes) -> type[ImageFile.ImageFile] | None:
    """The decoder by content. Not `Image.open`, which warns of large images before we can judge them."""
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    return None


def _check_header(image: ImageFile.ImageFile, data: bytes, limits: ImageLimits, field: str) -> None:
    """Refuse by what the header says. Pixels are not allocated yet (WebP's canvas is, but not touched)."""
    width, height = image.size
    if width * height > limits.max_pixels:
        raise _too_large(f"{width} × {height} pixels; at most {limits.max_pixels} in all", field)
    if max(width, height) > limits.max_side:
        raise _too_large(f"{width} × {height} pixels; at most {limits.max_side} a side", field)
    if max(width, height) > limits.max_aspect * min(width, height):
        raise _too_large(
            f"{width} × {height} pixels; at most {limits.max_aspect:g} times as long as wide", field
        )
    # Within the coded data FF DA is always a scan; the few in metadata do not matter.
    if image.info.get("progressive") and (scans := data.count(b"\xff\xda")) > _MAX_JPEG_SCANS:
        raise _too_large(f"{scans} progressive scans; at most {_MAX_JPEG_SCANS}", field)


def _upright_rgb(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        key = image.info.get("transparency")
        image = image.point(lambda value: value / 257 + 0.5).convert("L")
        if key is not None:
            image.info["transparency"] = round(key / 257)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer)
    upright = image.convert("RGB")
    if orientation in _UPRIGHT:
        upright = upright.transpose(_UPRIGHT[orientation])
    upright.info.clear()
    return upright


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def _too_large(message: str, field: str) -> InvalidInput:
    return InvalidInput(message, reason="LIMIT_EXCEEDED", field=field)
