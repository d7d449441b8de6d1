"""What of a video's limits holds before a frame of it is decoded."""

from __future__ import annotations

import asyncio
import io

import pytest
import torch
from PIL import ExifTags, Image

from hiprune.errors import InvalidInput
from hiprune.telemetry import start_clock
from hiprune.v1 import encoder_service_pb2, media_pb2
from services.encoder import engine as engines
from services.encoder.engine import VisionEngine
from services.encoder.families import EncodedView, Prepared
from services.encoder.service import EncoderServicer
from services.encoder.settings import Settings


class Tower:
    """Keeps the sizes of the frames it is given."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, patches: int = 1) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.batches: list[int] = []
        self._patches = patches

    def prepare(self, image):
        return self.prepare_video([image], 1)

    def prepare_video(self, frames, frames_per_second):
        self.sizes = [frame.size for frame in frames]
        return Prepared(torch.zeros(1), self._patches)

    def encode(self, items, layers, aligned):
        self.batches.append(len(items))
        return [[EncodedView(torch.zeros(1, 1), {}, (1, 1))] for _ in items]

    def warm_up(self, layers):
        pass


def frame(width: int = 20, height: int = 10, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


async def encode(*frames: bytes, **settings: int) -> list[tuple[int, int]]:
    tower = Tower()
    engine = VisionEngine(tower, Settings(**settings))
    try:
        media = media_pb2.Media(video=media_pb2.Video(frames=frames))
        await engine.encode(media, [], aligned=False, clock=start_clock())
    finally:
        await engine.close()
    return tower.sizes


async def refused(*frames: bytes, **settings: int) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        await encode(*frames, **settings)
    return caught.value


async def test_frames_of_one_upright_size_are_a_video() -> None:
    assert await encode(frame(), frame(10, 20, orientation=6), frame(orientation=3)) == [(20, 10)] * 3


async def test_no_frame_is_decoded_of_a_video_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "decode", None)
    error = await refused(frame(), frame(), frame(21))
    assert error.field == "media.video.frames[2]"
    assert "21 × 10 pixels, expected 20 × 10" in error.message
    error = await refused(frame(), frame(), b"no image")
    assert (error.field, error.reason) == ("media.video.frames[2]", "IMAGE_UNREADABLE")
    error = await refused(frame(), frame(), frame(), max_video_pixels=599)
    assert (error.field, error.reason) == ("media.video.frames", "LIMIT_EXCEEDED")
    assert "3 frames of 20 × 10 pixels, expected at most 599" in error.message
    monkeypatch.undo()
    assert len(await encode(frame(), frame(), frame(), max_video_pixels=600)) == 3


def test_all_frames_of_a_video_together_are_bounded_in_bytes() -> None:
    class Facts:
        takes_video = True

    class Checkpoint:
        facts = Facts

    servicer = EncoderServicer(Settings(max_video_bytes=20))
    servicer._checkpoint = Checkpoint  # type: ignore[assignment]
    for count in (2, 3):
        media = media_pb2.Media(video=media_pb2.Video(frames=[bytes(10)] * count))
        request = encoder_service_pb2.EncodeImageRequest(media=media)
        if count == 2:
            servicer._check_video(request.media.video)
            continue
        with pytest.raises(InvalidInput, match="30 bytes, expected at most 20") as caught:
            servicer._check_video(request.media.video)
        assert (caught.value.field, caught.value.reason) == ("media.video.frames", "LIMIT_EXCEEDED")


@pytest.mark.parametrize(("setting", "batches"), [(0, [2, 2, 1]), (576, [1] * 5), (3 * 576, [3, 2])])
async def test_forwards_hold_two_llava_images_on_a_cpu_unless_told_otherwise(
    setting: int, batches: list[int]
) -> None:
    tower = Tower(patches=576)
    engine = VisionEngine(tower, Settings(max_batch_patches=setting, max_wait_ms=200, decode_threads=5))
    media = media_pb2.Media(video=media_pb2.Video(frames=[frame()]))
    try:
        # the first arrival waits for company, for at most 200 ms
        await asyncio.gather(
            *(engine.encode(media, [], aligned=False, clock=start_clock()) for _ in range(sum(batches)))
        )
    finally:
        await engine.close()
    assert sum(tower.batches) == sum(batches)
    assert max(tower.batches) == max(batches)
