"""Any image that a stranger sends becomes upright RGB within limits, or an error that names what is wrong."""

import contextlib
import io
import struct
import tracemalloc
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageChops, ImageFile, features

from hiprune.errors import InvalidInput
from services.encoder.images import ImageLimits, decode_image, inspect

LIMITS = ImageLimits(max_bytes=2**20, max_pixels=10**6, max_side=2000)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes, limits: ImageLimits = LIMITS) -> Image.Image:
    return decode_image(data, limits=limits, field="media.image")


def refused(data: bytes, limits: ImageLimits = LIMITS) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        decoded(data, limits)
    assert caught.value.field == "media.image"
    return caught.value


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """`png` with one more chunk behind its header."""
    return png[:33] + chunk(kind, body) + png[33:]


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises what its few bytes of pixels do not hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def noise(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def quadrants() -> Image.Image:
    """32 × 48, each quadrant of its own colour: every orientation looks different."""
    image = Image.new("RGB", (32, 48))
    for box, colour in {
        (0, 0, 16, 24): "red",
        (16, 0, 32, 24): "lime",
        (0, 24, 16, 48): "blue",
        (16, 24, 32, 48): "white",
    }.items():
        image.paste(colour, box)
    return image


def close_to(image: Image.Image, expected: Image.Image, tolerance: int = 0) -> bool:
    difference = np.asarray(image).astype(int) - np.asarray(expected.convert("RGB")).astype(int)
    return bool(np.abs(difference).max() <= tolerance)


def test_lossless_pixels_survive_exactly() -> None:
    image = noise()
    for data in (encoded(image), encoded(image, "WEBP", lossless=True)):
        assert decoded(data).mode == "RGB"
        assert close_to(decoded(data), image)


def test_jpeg_and_lossy_webp_are_read() -> None:
    image = quadrants()
    for progressive in (False, True):
        data = encoded(image, "JPEG", quality=95, subsampling=0, progressive=progressive)
        assert close_to(decoded(data), image, 20)
    blended = Image.linear_gradient("L")
    assert close_to(decoded(encoded(blended, "WEBP", quality=95)), blended, 20)


def test_no_bytes_are_a_missing_field() -> None:
    assert refused(b"").reason == "MISSING_FIELD"


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"hello, this is text and no image at all",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"RIFF\x10\0\0\0WAVEfmt ",
    ],
)
def test_what_is_not_an_image_is_unreadable(data: bytes) -> None:
    assert refused(data).reason == "IMAGE_UNREADABLE"


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PPM", "ICO", "AVIF"])
def test_formats_outside_the_four_are_refused_by_content(form: str) -> None:
    error = refused(encoded(noise(32, 32), form))
    assert error.reason == "IMAGE_UNREADABLE"
    assert "JPEG, PNG, WebP or GIF" in error.message


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_image_cut_anywhere_is_unreadable(form: str, mode: str) -> None:
    data = encoded(noise(30, 20, mode), form)
    whole = len(data) - (2 if form == "GIF" else 0)  # a GIF's last two bytes close what is complete
    for end in range(3 if form == "JPEG" else 1, whole):
        assert refused(data[:end]).reason == "IMAGE_UNREADABLE"


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_corrupt_pixels_are_unreadable(form: str) -> None:
    data = bytearray(encoded(noise(), form, **({"lossless": True} if form == "WEBP" else {})))
    data[100:400] = bytes(300)
    assert refused(bytes(data)).reason == "IMAGE_UNREADABLE"


def test_random_damage_never_escapes_as_another_error() -> None:
    random = np.random.default_rng(7)
    palette = noise(mode="P")
    for data in (
        encoded(noise(), "JPEG", exif=oriented(6)),
        encoded(palette, transparency=3),
        encoded(noise(mode="RGBA"), "WEBP"),
        encoded(palette, "GIF"),
    ):
        for _ in range(150):
            damaged = bytearray(data)
            for position in random.integers(0, min(len(data), 400), 4):
                damaged[position] = random.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # Pillow's, of damaged EXIF
                with contextlib.suppress(InvalidInput):
                    assert decoded(bytes(damaged)).mode == "RGB"


def test_too_many_bytes_are_refused_with_value_and_bound() -> None:
    error = refused(b"\xff\xd8\xff" + bytes(2**20))
    assert error.reason == "LIMIT_EXCEEDED"
    assert "1048579" in error.message
    assert "1048576" in error.message


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_pixels_and_sides_are_bounded_with_value_and_bound(form: str) -> None:
    data = encoded(Image.new("RGB", (100, 50)), form)
    error = refused(data, ImageLimits(max_bytes=2**20, max_pixels=4999, max_side=2000))
    assert error.reason == "LIMIT_EXCEEDED"
    assert "100 × 50" in error.message
    assert "4999" in error.message
    error = refused(data, ImageLimits(max_bytes=2**20, max_pixels=5000, max_side=99))
    assert error.reason == "LIMIT_EXCEEDED"
    assert "100 × 50" in error.message
    assert "99" in error.message
    assert decoded(data, ImageLimits(max_bytes=2**20, max_pixels=5000, max_side=100)).size == (100, 50)


@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 10_000), (2**31 - 1, 1), (1000, 1001)])
def test_a_pixel_bomb_dies_at_its_header_without_allocation(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(self: ImageFile.ImageFile) -> None:
        raise AssertionError("pixels were allocated")

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", allocate)
    data = png_header(*size)
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nor does Pillow's warning get out
            error = refused(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert error.reason == "LIMIT_EXCEEDED"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_images_that_pillow_warns_of_decode_silently_within_our_limits(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(noise(60, 40), form)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(data).size == (60, 40)


def test_a_webp_canvas_beyond_the_limits_is_refused() -> None:
    frames = [Image.new("RGBA", (16, 16), colour) for colour in ("red", "blue")]
    data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    for limit_by in (12_000, 16_384):  # below and above Pillow's own bound
        data[24:30] = (limit_by - 1).to_bytes(3, "little") * 2
        assert refused(bytes(data)).reason == "LIMIT_EXCEEDED"


def test_a_progressive_jpeg_of_countless_scans_is_refused() -> None:
    data = encoded(Image.new("L", (1000, 1000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    error = refused(data[:-2] + scan * 200 + data[-2:])
    assert error.reason == "LIMIT_EXCEEDED"
    assert decoded(data[:-2] + scan * 20 + data[-2:]).size == (1000, 1000)


@pytest.mark.parametrize(
    ("kind", "head"),
    [(b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")],
)
def test_a_compressed_metadata_bomb_is_never_inflated(kind: bytes, head: bytes) -> None:
    squeezed = zlib.compress(bytes(50 * 2**20), 9)
    data = with_chunk(encoded(noise()), kind, head + squeezed)
    tracemalloc.start()
    try:
        picture = decoded(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert picture.size == (60, 40)


def test_harmless_metadata_does_not_disturb_and_does_not_survive() -> None:
    image = noise()
    profile = bytes(100_000)
    for form in ("PNG", "WEBP", "JPEG"):  # a GIF has none
        options = {"lossless": True} if form == "WEBP" else {}
        result = decoded(encoded(image, form, icc_profile=profile, exif=oriented(3), **options))
        assert result.info == {}
        assert not result.getexif()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(form: str, orientation: int) -> None:
    upright = quadrants()
    stored = {  # how a camera held that way stores the upright picture
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.rotate(180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.rotate(90, expand=True),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.rotate(-90, expand=True),
    }[orientation](upright)
    result = decoded(encoded(stored, form, exif=oriented(orientation)))
    assert result.size == upright.size
    centres = (slice(12, 48, 24), slice(8, 32, 16))  # of the four quadrants: what JPEG does not smear
    assert np.allclose(np.asarray(result)[centres], np.asarray(upright)[centres], atol=12)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    image = noise()
    assert close_to(decoded(encoded(image, exif=oriented(orientation))), image)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_broken_exif_block_does_not_cost_the_image() -> None:
    image = noise()
    for block in (b"not a TIFF header", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\xff\xff\xff\xff"):
        assert close_to(decoded(with_chunk(encoded(image), b"eXIf", block)), image)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA"])
def test_png_modes_become_the_same_rgb(mode: str) -> None:
    image = noise(mode="L").convert("1").convert(mode)  # pure black and white: exact in every mode
    assert close_to(decoded(encoded(image)), image)


@pytest.mark.parametrize("progressive", [False, True])
def test_cmyk_jpeg_becomes_rgb_with_adobes_marker_or_without(progressive: bool) -> None:
    image = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    data = encoded(image, "JPEG", quality=95, progressive=progressive)  # inverted, as Adobe's and everybody's
    at = data.index(b"\xff\xee")
    for each in (data, data[:at] + data[at + 16 :]):
        assert close_to(decoded(each), Image.new("RGB", (16, 16), (200, 40, 90)), 6)


def test_ycck_jpeg_becomes_rgb() -> None:
    cyan, magenta, yellow, black = 200, 40, 90, 30
    # Adobe's YCCK: the inks are stored inverted, and the first three as what JPEG makes of their complement
    inks = Image.new("RGB", (16, 16), (cyan, magenta, yellow)).convert("YCbCr")
    stored = Image.merge("CMYK", [*inks.split(), Image.new("L", (16, 16), 255 - black)])
    # written as four plain channels, which the writer would invert, and then declared to be YCCK
    data = bytearray(encoded(ImageChops.invert(stored), "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    shade = tuple(round((255 - ink) * (255 - black) / 255) for ink in (cyan, magenta, yellow))
    assert close_to(decoded(bytes(data)), Image.new("RGB", (16, 16), shade), 4)


@pytest.mark.parametrize("colours", ["YCbCr", "RGB"])
def test_how_a_jpegs_colours_are_coded_is_kept(colours: str) -> None:
    image = Image.new("RGB", (16, 16), (200, 40, 90))
    data = encoded(image, "JPEG", quality=95, keep_rgb=colours == "RGB")
    assert close_to(decoded(data), image, 6)


def test_grey_jpeg_becomes_rgb() -> None:
    assert close_to(decoded(encoded(Image.new("L", (16, 16), 77), "JPEG")), Image.new("L", (16, 16), 77), 2)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    result = np.asarray(decoded(encoded(Image.fromarray(values))))
    assert (result == np.round(values / 257)[..., None]).all()


@pytest.mark.parametrize(("colour_type", "samples"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_channels_are_scaled_to_eight(colour_type: int, samples: int) -> None:
    pixel = struct.pack(f">{samples}H", *[0x8000] * (samples - 1), 0x8000 if samples == 3 else 0xFFFF)
    header = struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0)
    rows = zlib.compress((b"\0" + pixel * 4) * 4)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert close_to(decoded(data), Image.new("L", (4, 4), 0x80))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(form: str) -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (*RED, alpha))
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    result = decoded(encoded(image, form, **options))
    assert [result.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (255, 127, 127), RED]


def test_transparent_colours_and_palette_entries_become_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    assert decoded(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    half = decoded(encoded(palette, transparency=bytes([255, 0])))
    assert [half.getpixel((x, 0)) for x in range(2)] == [RED, (255, 255, 255)]

    keyed = decoded(encoded(Image.new("RGB", (2, 2), RED), transparency=RED))
    assert keyed.getpixel((0, 0)) == (255, 255, 255)
    grey = decoded(encoded(Image.new("L", (2, 2), 9), transparency=9))
    assert grey.getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[30_000, 60_000]], dtype=np.uint16))
    result = decoded(encoded(deep, transparency=30_000))
    assert [result.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (233, 233, 233)]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_the_first_frame_of_an_animation_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert decoded(data).getpixel((8, 8)) == RED


def test_a_multi_picture_jpeg_gives_its_first_picture() -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert close_to(decoded(data), first, 3)


def gif(
    frame: tuple[int, int, int, int],
    screen: tuple[int, int],
    *,
    transparent: int | None = None,
    global_colours: bytes = b"",
    local_colours: bytes = b"",
) -> bytes:
    """A GIF whose frame (left, top, width, height), all of colour 1, lies on a screen of its own size."""
    sizes = [len(each) // 3 for each in (global_colours, local_colours)]
    flags = [0x80 | each.bit_length() - 2 if each else 0 for each in sizes]
    data = b"GIF89a" + struct.pack("<HHBBB", *screen, flags[0], 0, 0) + global_colours
    if transparent is not None:
        data += b"!\xf9\x04\x01\0\0" + bytes([transparent]) + b"\0"
    data += b"," + struct.pack("<HHHHB", *frame, flags[1]) + local_colours
    # LZW that never grows its codes of 8 bits: 128 clears its table, 129 ends
    pixels = min(frame[2] * frame[3], 1000)
    blocks = [b"\x80" + b"\1" * min(100, pixels - start) for start in range(0, pixels, 100)] + [b"\x81"]
    return data + b"\7" + b"".join(bytes([len(each)]) + each for each in blocks) + b"\0;"


COLOURS = bytes([*BLUE, *RED, 0, 255, 0, 9, 9, 9])


@pytest.mark.parametrize("interlace", [0, 1])
def test_gif_pixels_survive_exactly(interlace: int) -> None:
    image = noise(61, 43).quantize(200)
    data = encoded(image, "GIF", interlace=interlace)
    assert data != encoded(image, "GIF", interlace=1 - interlace)
    assert close_to(decoded(data), image)


def test_a_gifs_local_palette_wins_over_the_global_one() -> None:
    frame, screen = (0, 0, 4, 4), (4, 4)
    assert decoded(gif(frame, screen, global_colours=COLOURS)).getpixel((0, 0)) == RED
    turned = COLOURS[3:6] + COLOURS[:3] + COLOURS[6:]
    result = decoded(gif(frame, screen, global_colours=COLOURS, local_colours=turned))
    assert result.getpixel((0, 0)) == BLUE
    assert decoded(gif(frame, screen, local_colours=turned)).getpixel((0, 0)) == BLUE


def test_a_gifs_transparent_colour_becomes_white() -> None:
    frame, screen = (0, 0, 4, 4), (4, 4)
    for palette in ({"global_colours": COLOURS}, {"local_colours": COLOURS}):
        assert decoded(gif(frame, screen, transparent=1, **palette)).getpixel((0, 0)) == (255, 255, 255)
        assert decoded(gif(frame, screen, transparent=0, **palette)).getpixel((0, 0)) == RED


@pytest.mark.parametrize("transparent", [None, 0])
def test_a_gif_frame_smaller_than_its_screen_lies_on_white(transparent: int | None) -> None:
    data = gif((3, 2, 4, 5), (20, 10), global_colours=COLOURS, transparent=transparent)
    expected = Image.new("RGB", (20, 10), "white")
    expected.paste(RED, (3, 2, 7, 7))
    assert close_to(decoded(data), expected)


def test_a_gif_frame_beyond_its_screen_makes_it_larger() -> None:
    result = decoded(gif((3, 2, 4, 5), (1, 1), global_colours=COLOURS))
    assert result.size == (7, 7)
    assert result.getpixel((6, 6)) == RED
    assert result.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("frame", "screen"),
    [((0, 0, 4, 4), (65_535, 65_535)), ((65_000, 65_000, 4, 4), (4, 4)), ((0, 0, 65_535, 65_535), (4, 4))],
)
def test_a_gif_screen_or_frame_beyond_the_limits_dies_in_the_header(
    frame: tuple[int, int, int, int], screen: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(self: ImageFile.ImageFile) -> None:
        raise AssertionError("pixels were allocated")

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", allocate)
    data = gif(frame, screen, global_colours=COLOURS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refused(data).reason == "LIMIT_EXCEEDED"


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_later_frames_cost_nothing(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), (shade, 9, 9)) for shade in range(200)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert decoded(data).getpixel((8, 8)) == (0, 9, 9)
    outline = inspect(data, limits=LIMITS, field="media.image")
    if form == "GIF":  # they stay in the file, which is not read that far
        file = io.BytesIO(outline.file + bytes(10**6))
        Image.open(file).load()
        assert file.tell() < 10**5
    else:
        assert len(outline.file) < len(data) / 10


def test_a_damaged_later_frame_does_not_cost_the_first() -> None:
    frames = [noise(16, 16).quantize(16), noise(16, 16).quantize(9)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert close_to(decoded(data[:-40]), decoded(data))


def test_messages_never_quote_the_data() -> None:
    secret = b"SECRETSECRET"
    for data in (secret, with_chunk(encoded(noise()), b"quiz", secret)[:60], b"\xff\xd8\xff\xe0" + secret):
        assert "SECRET" not in str(refused(data))
        assert "quiz" not in str(refused(data))


def test_process_wide_settings_of_pillow_stay() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    decoded(encoded(noise()))
    refused(png_header(60_000, 60_000))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_this_pillow_reads_webp() -> None:
    assert features.check("webp")
