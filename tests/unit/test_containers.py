"""Files built to cost more than they show: their metadata is stepped over, their parts are counted."""

import io
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from hiprune import containers
from hiprune.containers import Damaged, Excessive, Outline

TINY = bytes([0xFF, 0xFE, 0, 2])
"""A JPEG segment, a comment, of no content."""


def encoded(form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), "red").save(buffer, form, **options)
    return buffer.getvalue()


def outline(data: bytes) -> Outline:
    found = containers.read(data)
    assert found is not None
    return found


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    return exif


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(each)) + each + b"\0" * (len(each) % 2) for kind, each in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def exif_bomb(entries: int, size: int) -> bytes:
    """A TIFF directory of `size` bytes, each of whose entries claims nearly all of it."""
    directory = b"".join(
        struct.pack("<HHII", number, 7, size - 8, 8) for number in range(1000, 1000 + entries)
    )
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + directory + bytes(4)).ljust(size, b"\0")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A stranger's file must not fill the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_the_outline_says_what_the_file_says(form: str) -> None:
    options = {} if form == "GIF" else {"exif": orientation(6)}
    found = outline(encoded(form, **options))
    assert (found.format, found.size) == (form, (48, 32))
    assert (found.orientation, found.upright_size) == ((1, (48, 32)) if form == "GIF" else (6, (32, 48)))


def test_lossy_lossless_and_extended_webp_say_their_size() -> None:
    for options in ({}, {"lossless": True}, {"icc_profile": b"p" * 100}):
        assert outline(encoded("WEBP", **options)).size == (48, 32)


def test_scans_of_a_jpeg_are_counted_up_to_its_end() -> None:
    assert outline(encoded("JPEG")).scans == 1
    progressive = encoded("JPEG", progressive=True)
    count = outline(progressive).scans
    assert count > 5
    # a telephone's JPEG has a video behind it
    assert outline(progressive + b"\xff\xda\0\4aa" * 1000).scans == count
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    assert outline(progressive[:-2] + scan * 200 + progressive[-2:]).scans == count + 200


def test_scans_of_a_jpeg_that_is_not_progressive_count_too() -> None:
    data = encoded("JPEG")
    start = data.index(b"\xff\xda")
    assert outline(data[:-2] + data[start : start + 14] * 500 + data[-2:]).scans == 501


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_metadata_does_not_reach_a_decoder(form: str) -> None:
    secret = b"a private word " * 9
    exif = orientation(3)
    exif[ExifTags.Base.ImageDescription] = secret.decode()
    data = encoded(form, exif=exif, icc_profile=secret, comment=secret)
    assert secret in data or form == "PNG"
    found = outline(data)
    assert secret not in found.file
    assert found.orientation == 3
    with Image.open(io.BytesIO(found.file)) as image:
        assert not image.getexif()
        assert not {"icc_profile", "exif", "comment", "xmp"} & image.info.keys()


def test_an_exif_directory_that_claims_itself_many_times_costs_nothing() -> None:
    bomb = exif_bomb(5000, 65_500)  # 300 MB, if each of its entries were read
    jpeg = encoded("JPEG")
    large = exif_bomb(60_000, 2**20)  # 60 GB
    png, webp = encoded("PNG"), encoded("WEBP", icc_profile=b"p")
    tracemalloc.start()
    try:
        for data in (
            jpeg[:2] + segment(0xE1, b"Exif\0\0" + bomb) + jpeg[2:],
            png[:33] + chunk(b"eXIf", large) + png[33:],
            riff((b"VP8X", webp[20:30]), (b"EXIF", large)),
        ):
            tracemalloc.reset_peak()
            assert outline(data).orientation == 1
            assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_read_in_either_byte_order_and_any_integer_type(kind: int, order: str) -> None:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + {1: "B", 3: "H", 4: "I"}[kind], 8).ljust(4, b"\0")
    tiff = mark + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4)
    png = encoded("PNG")
    assert outline(png[:33] + chunk(b"eXIf", tiff) + png[33:]).orientation == 8
    behind = png[:-12] + chunk(b"eXIf", tiff) + png[-12:]
    assert outline(behind).orientation == 8


@pytest.mark.parametrize(
    "tiff",
    [
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0",
        b"II*\0\x08\0\0\0\xff\xff",
        b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0",
        b"PP*\0\x08\0\0\0\1\0",
    ],
)
def test_a_broken_exif_block_means_upright(tiff: bytes) -> None:
    png, jpeg = encoded("PNG"), encoded("JPEG")
    assert outline(png[:33] + chunk(b"eXIf", tiff) + png[33:]).orientation == 1
    assert outline(jpeg[:2] + segment(0xE1, b"Exif\0\0" + tiff) + jpeg[2:]).orientation == 1


def test_parts_beyond_any_real_file_are_excessive() -> None:
    jpeg, png = encoded("JPEG"), encoded("PNG")
    many = containers.MAX_PARTS
    for data in (
        jpeg[:2] + TINY * many + jpeg[2:],
        jpeg[:-2] + TINY * many + jpeg[-2:],
        jpeg[:2] + segment(0xDB, bytes(65) * 900) * 2 + jpeg[2:],
        png[:33] + chunk(b"quIz", b"") * many + png[33:],
        riff((b"VP8X", bytes(10)), *[(b"JUNK", b"")] * many),
        b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe" + b"\1x" * many,
        b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\0" * many,
        b"GIF89a\1\0\1\0\0\0\0" + b"\0" * many,
    ):
        with pytest.raises(Excessive, match="more than 65536"):
            containers.read(data)


def test_as_many_parts_as_files_have_are_read() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    whole = outline(buffer.getvalue()).file
    coded = whole[41:-16]  # of the one chunk of pixels
    split = whole[:33] + b"".join(chunk(b"IDAT", coded[at : at + 4]) for at in range(0, len(coded), 4))
    assert outline(split + whole[-12:]).file == whole


def test_junk_between_the_segments_of_a_jpeg_is_dropped() -> None:
    jpeg = encoded("JPEG")
    data = jpeg[:2] + TINY + bytes(10**6) + b"\xff" * 1000 + jpeg[2:] + b"junk"
    assert outline(data).file == outline(jpeg).file


def test_an_apng_is_its_default_image() -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    file = outline(buffer.getvalue()).file
    assert not any(kind in file for kind in (b"acTL", b"fcTL", b"fdAT"))


@pytest.mark.parametrize("place", ["IHDR", "PLTE", "tRNS", "IDAT"])
def test_a_png_whose_checksums_fail_is_damaged(place: str) -> None:
    buffer = io.BytesIO()
    Image.new("P", (8, 8)).save(buffer, "PNG", transparency=0)
    data = bytearray(buffer.getvalue())
    data[data.index(place.encode()) + 5] ^= 1
    with pytest.raises(Damaged):
        containers.read(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xda\0\2\xff\xd9",
        b"\xff\xd8\xff\xc0\0\2\xff\xda\0\2\xff\xd9",
        b"\xff\xd8\xff\xe0\0\1",
        b"\xff\xd8\xff\xe0\xff\xff",
        b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""),
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"") + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) * 2 + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
        b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR",
        riff(),
        riff((b"VP8L", b"\x2f")),
        riff((b"VP8 ", bytes(10))),
        riff((b"VP8X", bytes(9))),
        riff((b"ICCP", bytes(9))),
        b"RIFF\xff\xff\xff\xffWEBP",
        b"RIFF\x0c\0\0\0WEBPVP8L\xff\xff\xff\xff",
        b"GIF89a",
        b"GIF89a\1\0\1\0\0\0\0;",
        b"GIF89a\1\0\1\0\0\0\0!",
        b"GIF89a\1\0\1\0\0\0\0!\xf9\4",
        b"GIF89a\1\0\1\0\0\0\0,\0\0",
        b"GIF89a\1\0\1\0\x87\0\0,",
    ],
)
def test_what_is_not_built_as_its_format_says_is_damaged(data: bytes) -> None:
    with pytest.raises(Damaged):
        containers.read(data)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"BM", b"<svg/>", b"RIFF\0\0\0\0WAVE", b"GIF88a"])
def test_other_formats_have_no_outline(data: bytes) -> None:
    assert containers.read(data) is None
