"""Image files that are nearly right: real ones of every kind, taken apart and put together wrongly."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from hypothesis import strategies as st
from PIL import ExifTags, Image

Draw = Callable[[st.SearchStrategy[Any]], Any]

_EDGES: Final = (0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFE, 0xFF)
_WIDE_EDGES: Final = (0, 1, 2, 0x7F, 0xFF, 0x100, 0x3FFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)


@cache
def whole_files() -> tuple[bytes, ...]:
    """One real file of each format, mode and option that our decoders know."""
    pixels = np.random.default_rng(5).integers(0, 256, (18, 26, 3), dtype=np.uint8)
    noise = Image.fromarray(pixels)
    plain = Image.new("RGB", (26, 18), (200, 40, 90))
    deep = Image.fromarray(np.arange(26 * 18, dtype=np.uint16).reshape(18, 26) * 99)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "a picture"
    files = []

    def add(image: Image.Image, form: str, **options: Any) -> None:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        files.append(buffer.getvalue())

    for image in (noise, plain):
        add(image, "JPEG", exif=exif, icc_profile=b"profile" * 9, comment=b"said")
        add(image, "JPEG", progressive=True, subsampling=2)
        add(image, "JPEG", keep_rgb=True, restart_marker_blocks=1)
        add(image.convert("L"), "JPEG", restart_marker_rows=1)
        add(image.convert("CMYK"), "JPEG", progressive=image is plain)
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
            add(image.convert(mode), "PNG", exif=exif, icc_profile=b"profile" * 9)
        add(image.quantize(9), "PNG", transparency=bytes([0, 128, 255]))
        add(image, "PNG", transparency=(200, 40, 90))
        for options in ({}, {"lossless": True}, {"exif": exif, "icc_profile": b"profile" * 9}):
            add(image, "WEBP", **options)
            add(image.convert("RGBA"), "WEBP", **options)
        for options in ({}, {"interlace": 0}, {"transparency": 3, "comment": b"said"}):
            add(image.quantize(60), "GIF", **options)
        add(image.convert("L"), "GIF")
    add(deep, "PNG")
    add(deep, "PNG", transparency=99)
    frames = [noise, plain, noise.rotate(180)]
    for form, options in (("GIF", {"disposal": 2}), ("WEBP", {"lossless": True}), ("PNG", {})):
        add(frames[0], form, save_all=True, append_images=frames[1:], **options)
        add(frames[0], form, save_all=True, append_images=frames[1:], loop=0, duration=9)
    add(frames[0], "MPO", save_all=True, append_images=frames[1:])
    return tuple(files)


def pieces(data: bytes) -> list[bytes]:
    """A real file, cut where its format begins something new."""
    cuts = [0]
    if data.startswith(b"\x89PNG"):
        position = 8
        while position < len(data):
            cuts.append(position)
            position += 12 + int.from_bytes(data[position : position + 4])
    elif data.startswith(b"RIFF"):
        position = 12
        while position < len(data):
            cuts.append(position)
            length = int.from_bytes(data[position + 4 : position + 8], "little")
            position += 8 + length + length % 2
    elif data.startswith(b"GIF"):
        start = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
        cuts += [6, 13, start, data.index(b",", start), data.index(b",", start) + 10, len(data) - 2]
    else:
        position = 2
        while position < len(data) and data[position] == 0xFF:
            cuts.append(position)
            if data[position + 1] == 0xDA:
                cuts.append(position + 2 + int.from_bytes(data[position + 2 : position + 4]))
                break
            position += 2 + int.from_bytes(data[position + 2 : position + 4])
        cuts.append(len(data) - 2)
    cuts = sorted({cut for cut in cuts if cut < len(data)})
    return [data[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(data)], strict=True)]


@st.composite
def broken_files(draw: Draw) -> bytes:
    """A real file after up to four accidents, in its structure and then in its bytes."""
    files = whole_files()
    parts = pieces(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(0, 3))):
        _reshape(draw, parts, files)
    if draw(st.booleans()):
        parts = [_with_checksum(part) for part in parts]
    data = bytearray(b"".join(parts))
    for _ in range(draw(st.integers(0, 4))):
        _scratch(draw, data)
    return bytes(data)


def _reshape(draw: Draw, parts: list[bytes], files: tuple[bytes, ...]) -> None:
    """One accident to the list of pieces."""
    if not parts:
        return
    place = draw(st.integers(0, len(parts) - 1))
    match draw(st.integers(0, 6)):
        case 0:
            parts[place : place + 1] = [parts[place]] * draw(st.sampled_from([2, 3, 50, 300]))
        case 1:
            del parts[place]
        case 2:
            other = draw(st.integers(0, len(parts) - 1))
            parts[place], parts[other] = parts[other], parts[place]
        case 3:
            strange = pieces(draw(st.sampled_from(files)))
            parts.insert(place, draw(st.sampled_from(strange)))
        case 4:
            piece = bytearray(parts[place])
            for _ in range(draw(st.integers(1, 3))):
                _scratch(draw, piece)
            parts[place] = bytes(piece)
        case 5:
            end = draw(st.integers(0, len(parts[place])))
            parts[place] = parts[place][:end]
        case _:
            parts[place] += draw(st.binary(max_size=40))


def _scratch(draw: Draw, data: bytearray) -> None:
    """One accident to the bytes; more often near the beginning, where headers are."""
    if not data:
        return
    span = draw(st.sampled_from([16, 32, 64, len(data)]))
    place = draw(st.integers(0, min(span, len(data)) - 1))
    match draw(st.integers(0, 6)):
        case 0:
            data[place] = draw(st.sampled_from(_EDGES))
        case 1:
            data[place] = draw(st.integers(0, 255))
        case 2:
            data[place] ^= 1 << draw(st.integers(0, 7))
        case 3 | 4:
            form = draw(st.sampled_from([">H", "<H", ">I", "<I"]))
            value = draw(st.sampled_from(_WIDE_EDGES)) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF)
            data[place : place + struct.calcsize(form)] = struct.pack(form, value)
        case 5:
            del data[draw(st.integers(0, len(data))) :]
        case _:
            data[place:place] = draw(st.binary(min_size=1, max_size=20))


def _with_checksum(part: bytes) -> bytes:
    """A PNG chunk whose length and checksum are right again; other pieces as they are."""
    if len(part) < 12 or not part[4:8].isalpha():
        return part
    body = part[4:-4]
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
