"""What an encoded image file is made of: format, size and orientation, and the bytes that a decoder needs.

Walks the file's own structure and decodes nothing. What is no pixels' business is left out: EXIF, colour
profiles, text, thumbnails, later frames, whatever follows the end. A decoder never sees it, so that none of
it can cost anything. Every walk is bounded in steps, and takes no memory but the slices it keeps.

Sources: ITU-T T.81 annex B (JPEG), W3C PNG third edition, RFC 9649 (WebP), GIF89a, TIFF 6.0 (within EXIF).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

Format = Literal["JPEG", "PNG", "WEBP", "GIF"]

MAX_PARTS: Final = 65_536
"""Most segments, chunks or blocks of one file that are looked at: tens of milliseconds."""
_MAX_TABLE_BYTES: Final = 65_536
"""Of a JPEG's tables before its first scan, which Pillow reads number by number; real ones have 2 KB."""

_MARKER: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
"""A JPEG marker that is neither a stuffed zero, a fill byte nor a restart."""
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""SOFn: the image's size and kind; DHT, JPG and DAC lie among them."""
_TABLES: Final = frozenset({0xC4, 0xCC, 0xDB, 0xDD})
"""DHT, DAC, DQT, DRI."""
_JFIF: Final = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
"""The smallest one. Its presence decides colours; its density and thumbnail are nobody's business."""

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_CRITICAL: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
"""What makes pixels of a PNG. Transparency counts."""
_ANIMATED, _ALPHA = 0x02, 0x10
"""Flags of a WebP's VP8X chunk."""
_WEBP_ANIMATION: Final = frozenset({b"ANIM", b"ANMF"})
_WEBP_STILL: Final = frozenset({b"ALPH", b"VP8 ", b"VP8L"})


class Damaged(Exception):
    """The file ends early, or is not built as its format says."""


class Excessive(Exception):
    """More parts than any real file has. The message says of what, and the bound."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What a file says before a pixel is decoded."""

    format: Format
    size: tuple[int, int]
    """Width and height of the picture in pixels, as stored."""
    file: bytes
    """A file of the same format that holds the first frame's pixels and nothing else."""
    orientation: int = 1
    """How EXIF says the picture is to be turned: 1 to 8; 1, upright, where it says nothing legal."""
    scans: int = 1
    """Passes over the pixels that decoding takes."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, width and height of the frame within a GIF's canvas, and then `file` holds that frame."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height once it is turned."""
        width, height = self.size
        return (height, width) if self.orientation >= 5 else (width, height)


def read(data: bytes) -> Outline | None:
    """The outline of a file, None for a format that is none of the four.

    Raises Damaged, and Excessive for what no walk should follow to its end.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(_PNG_SIGNATURE):
        return _png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif(data)
    return None


def _jpeg(data: bytes) -> Outline:
    """Segments up to the end of the image. Before the first scan, those stay that decoding needs."""
    head = [b"\xff\xd8"]
    size: tuple[int, int] | None = None
    jfif = adobe = b""
    orientation = scans = tables = first_scan = 0
    for marker, start, body, end in _segments(data):
        if marker == _EOI:
            if size is None or not scans:
                raise Damaged("no frame or no scan")
            file = b"".join((*head, jfif, adobe, data[first_scan:end]))
            return Outline("JPEG", size, file, orientation or 1, scans)
        if marker == _SOS:
            first_scan = first_scan or start
            scans += 1
        elif marker in _FRAMES:
            if size is not None or end < body + 6:
                raise Damaged("a second frame, or none")
            height, width = struct.unpack_from(">HH", data, body + 1)
            size = (width, height)
            head.append(data[start:end])
        elif scans:  # goes along as it is: the decoder steps over what it has no use for
            continue
        elif marker in _TABLES:
            tables += end - start
            if tables > _MAX_TABLE_BYTES:
                raise Excessive(f"more than {_MAX_TABLE_BYTES} bytes of tables")
            head.append(data[start:end])
        elif marker == 0xE0 and data.startswith(b"JFIF\0", body):
            jfif = _JFIF
        elif marker == 0xEE and data.startswith(b"Adobe", body) and end >= body + 12:
            adobe = b"\xff\xee\0\x0e" + data[body : body + 12]  # the last byte is how colours are coded
        elif marker == 0xE1 and not orientation and data.startswith(b"Exif\0\0", body):
            orientation = _orientation(data[body + 6 : end])
    raise Damaged("no end of image")


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """A JPEG's marker segments: marker, and where it, its body and what follows begin.

    Coded data and junk between them are stepped over: in coded data no byte behind an FF makes a marker.
    """
    position = 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, position)
        if found is None:
            return
        start, marker = found.start(), data[found.start() + 1]
        body = position = start + 2
        if marker not in (_SOI, _EOI, _TEM):  # which have no body
            body = start + 4
            position += int.from_bytes(data[start + 2 : body])
            if position < body or position > len(data):
                raise Damaged("a segment that does not fit")
        yield marker, start, body, position
    raise Excessive(f"more than {MAX_PARTS} segments")


def _png(data: bytes) -> Outline:
    """Chunks up to IEND. What APNG adds is left out, so that the default image remains, as in any viewer."""
    head: list[bytes] = []
    pixels: list[bytes] = []
    orientation = 0
    for kind, start, end in _chunks(data):
        body = slice(start + 8, end - 4)
        if (kind == b"IHDR") != (start == len(_PNG_SIGNATURE)):
            raise Damaged("a header that is not first, or not the only one")
        if kind in _PNG_CRITICAL and zlib.crc32(memoryview(data)[start + 4 : end - 4]) != int.from_bytes(
            data[end - 4 : end]
        ):
            raise Damaged("a chunk that was altered")
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            pixels.append(data[body])
        elif kind in _PNG_CRITICAL:
            head.append(data[start:end])
        elif kind == b"eXIf" and not orientation:
            orientation = _orientation(data[body])
    else:
        raise Damaged("no end of image")
    if not pixels or len(head[0]) != 25:
        raise Damaged("no pixels, or a header of another length")
    width, height = struct.unpack_from(">II", head[0], 8)
    # one chunk of pixels: a decoder takes a turn of the interpreter for each
    tail = (_png_chunk(b"IDAT", b"".join(pixels)), _png_chunk(b"IEND", b""))
    return Outline("PNG", (width, height), b"".join((_PNG_SIGNATURE, *head, *tail)), orientation or 1)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """A PNG's chunks: kind, and where each begins and ends, length and checksum included."""
    start = len(_PNG_SIGNATURE)
    for _ in range(MAX_PARTS):
        if start + 12 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            raise Damaged("a chunk that does not fit")
        yield kind, start, end
        start = end
    raise Excessive(f"more than {MAX_PARTS} chunks")


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(body)), kind, body, struct.pack(">I", checksum)))


def _webp(data: bytes) -> Outline:
    """RIFF chunks. Of an animation the first frame stays, alone on its canvas."""
    kept: dict[bytes, bytes] = {}
    wanted: frozenset[bytes] = frozenset()
    size: tuple[int, int] | None = None
    orientation = 0
    for kind, body in _riff_chunks(data):
        if size is None:  # the first chunk says which kind of file it is
            size = _webp_size(kind, body)
            kept[kind] = body
            if kind == b"VP8X":
                flags = body[0] & (_ANIMATED | _ALPHA)
                kept[kind] = bytes([flags]) + body[1:10]
                wanted = _WEBP_ANIMATION if flags & _ANIMATED else _WEBP_STILL
        elif kind in wanted:
            kept.setdefault(kind, body)
        elif kind == b"EXIF" and not orientation:
            orientation = _orientation(body.removeprefix(b"Exif\0\0"))
    if size is None:
        raise Damaged("no image")
    parts = [b"WEBP"]
    for kind, body in kept.items():
        parts += [kind, struct.pack("<I", len(body)), body, b"\0" * (len(body) % 2)]
    file = b"".join(parts)
    return Outline("WEBP", size, b"RIFF" + struct.pack("<I", len(file)) + file, orientation or 1)


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """A WebP's chunks: kind and content."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise Damaged("shorter than it says")
    start = 12
    for _ in range(MAX_PARTS):
        if start + 8 > end:
            return
        kind, length = struct.unpack_from("<4sI", data, start)
        start += 8 + length
        if start > end:
            raise Damaged("a chunk that does not fit")
        yield kind, data[start - length : start]
        start += length % 2
    raise Excessive(f"more than {MAX_PARTS} chunks")


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    """Width and height, as the first chunk of a WebP file says them. Raises Damaged."""
    if kind == b"VP8X" and len(body) >= 10:
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        sides = int.from_bytes(body[1:5], "little")
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(body) >= 10 and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    raise Damaged("no image")


def _gif(data: bytes) -> Outline:
    """Blocks up to the first image. What lies behind its descriptor is the decoder's, which stops by itself.

    A frame outside of the screen makes the screen larger, as in browsers. The frame's own file has it alone.
    """
    if len(data) < 13:
        raise Damaged("no screen")
    screen_width, screen_height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13
    colours = data[position : position + _colours(flags)]
    position += len(colours)
    transparent: int | None = None
    in_extension = False
    for _ in range(MAX_PARTS):
        if position >= len(data):
            raise Damaged("no image")
        kind = data[position]
        position += 1
        if in_extension:  # its sub-blocks, each behind its length, the last one empty
            position += kind
            in_extension = kind > 0
        elif kind == 0x21:
            if data[position : position + 2] == b"\xf9\x04" and len(data) >= position + 6:
                transparent = data[position + 5] if data[position + 2] & 1 else None
            position += 1
            in_extension = True
        elif kind == 0x3B:
            raise Damaged("no image")
        elif kind == 0x2C:
            break
    else:
        raise Excessive(f"more than {MAX_PARTS} blocks")
    if len(data) < position + 9:
        raise Damaged("no image")
    left, top, width, height, local = struct.unpack_from("<HHHHB", data, position)
    control = b"" if transparent is None else b"!\xf9\x04\x01\0\0" + bytes([transparent]) + b"\0"
    file = b"".join(
        (
            b"GIF89a" + struct.pack("<HHBBB", width, height, flags, 0, 0),
            colours,
            control,
            b"," + struct.pack("<HHHHB", 0, 0, width, height, local),
            data[position + 9 :],
        )
    )
    size = max(screen_width, left + width), max(screen_height, top + height)
    return Outline("GIF", size, file, box=(left, top, width, height))


def _colours(flags: int) -> int:
    """Bytes of the colour table that the flags of a GIF's screen announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _orientation(tiff: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1 where the block is broken, which says nothing about the pixels."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, start)
    fitting = min(count, (len(tiff) - start - 2) // 12)
    for entry in range(start + 2, start + 2 + 12 * fitting, 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, entry)
        if tag == 0x0112:
            # a short by the book; some writers take a byte or a long
            (value,) = struct.unpack_from(order + {1: "B", 4: "I"}.get(kind, "H"), tiff, entry + 8)
            return value if 1 <= value <= 8 else 1
    return 1
