"""An image or a video of a request, before it is used. Knows the pruner's limits; decodes nothing."""

from __future__ import annotations

import math

from hiprune.errors import InvalidInput
from hiprune.v1 import media_pb2
from services.pruner.settings import Settings


def check(media: media_pb2.Media, settings: Settings) -> None:
    """Refuses missing, empty and oversized media before a byte of it is hashed or sent on.

    Raises InvalidInput (`media.…`).
    """
    kind = media.WhichOneof("content")
    if kind is None:
        raise InvalidInput("is missing, expected an image or a video", field="media", reason="MISSING_FIELD")
    if kind == "image":
        _check_size(len(media.image), settings.max_image_bytes, "media.image")
        return
    frames = media.video.frames
    if not 1 <= len(frames) <= settings.max_frames:
        raise InvalidInput(
            f"{len(frames)} frames, expected 1 to {settings.max_frames}", field="media.video.frames"
        )
    total = 0
    for number, frame in enumerate(frames):
        _check_size(len(frame), settings.max_image_bytes, f"media.video.frames[{number}]")
        total += len(frame)
    if total > settings.max_video_bytes:
        raise InvalidInput(
            f"{total} bytes, expected at most {settings.max_video_bytes} in all frames together",
            field="media.video.frames",
            reason="LIMIT_EXCEEDED",
        )
    rate = media.video.frames_per_second
    if media.video.HasField("frames_per_second") and not 0 < rate < math.inf:
        raise InvalidInput(f"{rate}, expected more than 0", field="media.video.frames_per_second")


def _check_size(size: int, most: int, field: str) -> None:
    if size == 0:
        raise InvalidInput("is empty, expected an encoded image", field=field, reason="MISSING_FIELD")
    if size > most:
        raise InvalidInput(
            f"{size} bytes, expected at most {most}",
            field=field,
            reason="LIMIT_EXCEEDED",
        )
