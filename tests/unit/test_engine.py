"""What holds before an image or a frame is decoded, and for whom nothing is."""

from __future__ import annotations

import asyncio
import io
import threading

import pytest
import torch
from PIL import ExifTags, Image

from hiprune.errors import Exhausted, InvalidInput
from hiprune.telemetry import start_clock
from hiprune.v1 import encoder_service_pb2, media_pb2
from services.encoder import engine as engines
from services.encoder import images
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

    def patches(self, size, frames=None):
        return self._patches

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


async def test_nobodys_frames_are_decoded_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate, decoded = threading.Event(), threading.Event(), []

    def decode(outline, *, field):
        decoded.append(field)
        begun.set()
        gate.wait(20)
        return images.decode(outline, field=field)

    monkeypatch.setattr(engines, "decode", decode)
    tower = Tower()
    engine = VisionEngine(tower, Settings(decode_threads=1))
    video = media_pb2.Media(video=media_pb2.Video(frames=[frame()] * 3))
    leaves = asyncio.create_task(engine.encode(video, [], aligned=False, clock=start_clock()))
    await asyncio.to_thread(begun.wait)
    leaves.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaves
    gate.set()
    image = media_pb2.Media(image=frame(30, 20))
    await engine.encode(image, [], aligned=False, clock=start_clock())
    await engine.close()
    assert decoded == ["media.video.frames[0]", "media.image"]
    assert tower.sizes == [(30, 20)]


async def test_nothing_is_decoded_that_would_find_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate = threading.Event(), threading.Event()

    class Busy(Tower):
        def encode(self, items, layers, aligned):
            entered.set()
            gate.wait(20)
            return super().encode(items, layers, aligned)

    engine = VisionEngine(Busy(patches=576), Settings(max_queue_patches=576, max_wait_ms=0))
    image = media_pb2.Media(image=frame())

    def encode() -> asyncio.Task:
        return asyncio.create_task(engine.encode(image, [], aligned=False, clock=start_clock()))

    runs = encode()
    await asyncio.to_thread(entered.wait)
    waits = encode()
    while not engine._batcher.depth:  # noqa: ASYNC110  # which sets no event
        await asyncio.sleep(0.001)
    monkeypatch.setattr(engines, "inspect", None)
    with pytest.raises(Exhausted, match="the queue is full: 576 patches wait, 1 more; at most 576"):
        await encode()
    monkeypatch.undo()
    gate.set()
    await asyncio.gather(runs, waits)
    await engine.close()


async def test_of_a_burst_no_more_is_decoded_than_finds_room(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate, decoded = threading.Event(), threading.Event(), []

    class Busy(Tower):
        def encode(self, items, layers, aligned):
            entered.set()
            gate.wait(20)
            return super().encode(items, layers, aligned)

    def decode(outline, *, field):
        decoded.append(field)
        return images.decode(outline, field=field)

    monkeypatch.setattr(engines, "decode", decode)
    settings = Settings(max_queue_patches=2 * 576, max_wait_ms=0, decode_threads=1)
    engine = VisionEngine(Busy(patches=576), settings)

    def encode() -> asyncio.Task:
        image = media_pb2.Media(image=frame())
        return asyncio.create_task(engine.encode(image, [], aligned=False, clock=start_clock()))

    runs = encode()
    await asyncio.to_thread(entered.wait, 20)
    burst = [encode() for _ in range(8)]
    try:
        waiting = set(burst)
        while len(waiting) > 2:
            _, waiting = await asyncio.wait(waiting, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gate.set()
    await asyncio.gather(runs, *waiting)
    await engine.close()
    refused = [task.exception() for task in burst if task not in waiting]
    assert all(isinstance(error, Exhausted) for error in refused)
    assert len(decoded) == 3  # the one that runs, and two that wait


@pytest.mark.parametrize(
    ("media", "field", "what"),
    [
        (media_pb2.Media(image=frame()), "media.image", "20 × 10 pixels are 577 patches"),
        (
            media_pb2.Media(video=media_pb2.Video(frames=[frame()] * 2)),
            "media.video.frames",
            "2 frames of 20 × 10 pixels are 577 patches",
        ),
    ],
)
async def test_what_a_tower_would_have_to_compute_is_bounded_before_a_pixel_is_decoded(
    monkeypatch: pytest.MonkeyPatch, media: media_pb2.Media, field: str, what: str
) -> None:
    monkeypatch.setattr(engines, "decode", None)
    engine = VisionEngine(Tower(patches=577), Settings(max_item_patches=576))
    with pytest.raises(InvalidInput, match=f"{what}, expected at most 576") as caught:
        await engine.encode(media, [], aligned=False, clock=start_clock())
    await engine.close()
    assert (caught.value.field, caught.value.reason) == (field, "LIMIT_EXCEEDED")
