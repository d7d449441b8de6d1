"""The largest image of a tenant's, held against media as they come. Reads headers; decodes nothing."""

from __future__ import annotations

from collections.abc import Iterator

from hiprune import containers
from hiprune.auth import Limits
from hiprune.errors import InvalidInput
from hiprune.v1 import media_pb2


def check_media(media: media_pb2.Media, limits: Limits, *, field: str) -> None:
    """Refuses an image, or a frame, that is larger than its tenant may send. Blocks for a header's parse.

    `field` is the path of `media`. Raises InvalidInput naming the limit. What is no image is the encoder's
    to refuse, in its own words.
    """
    if not limits.bounds_images:
        return
    for image, place in _images(media, field):
        _check("max_image_bytes", len(image), limits.max_image_bytes, "bytes", place)
        if limits.max_image_pixels is not None:
            try:
                outline = containers.read(image)
            except (containers.Damaged, containers.Excessive):
                continue
            if outline is not None:
                width, height = outline.size
                _check("max_image_pixels", width * height, limits.max_image_pixels, "pixels", place)


def _images(media: media_pb2.Media, field: str) -> Iterator[tuple[bytes, str]]:
    if media.WhichOneof("content") == "video":
        for number, frame in enumerate(media.video.frames):
            yield frame, f"{field}.video.frames[{number}]"
    else:
        yield media.image, f"{field}.image"


def _check(name: str, size: int, most: int | None, unit: str, field: str) -> None:
    if most is not None and size > most:
        raise InvalidInput(
            f"{size} {unit}, at most {most} for this tenant ({name})", field=field, reason="LIMIT_EXCEEDED"
        )
