"""From encoded bytes to views: decode and resize on a thread pool, the tower on one thread, in batches.

Knows no gRPC and no family: a family's adapter gives the tower.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from hiprune import auth, devices, telemetry
from hiprune.errors import InvalidInput
from hiprune.telemetry import Note, StageClock, stage
from hiprune.v1 import encoder_service_pb2, media_pb2
from hiprune.workers import Abandoned, Workers
from services.encoder.batching import MicroBatcher
from services.encoder.families import EncodedView, Prepared, Tower
from services.encoder.images import ImageLimits, decode, inspect
from services.encoder.settings import Settings

BATCH_PATCHES: Final = {"cpu": 1152, "cuda": 16_384}
"""Patches of a forward where no setting says how many. On a CPU two LLaVA images, since larger batches leave
its caches and slow down (`benchmarks/encoder_load.py`); on a GPU 28 of them, or one of 1792 × 1792 pixels in
Qwen2.5-VL."""

DEFAULT_RATE: Final = 2.0
"""Frames per second of a video that says nothing else."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One media item's views, and how they belong together."""

    views: list[EncodedView]
    layout: encoder_service_pb2.MediaLayout


@dataclass(frozen=True, slots=True)
class _Job:
    prepared: Prepared
    layers: frozenset[int]
    aligned: bool


class VisionEngine:
    """A tower that serves concurrent requests."""

    def __init__(self, tower: Tower, settings: Settings) -> None:
        self._tower = tower
        self._watch = devices.Watch(tower.device)
        self._limits = ImageLimits(
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            max_side=settings.max_image_side,
        )
        self._max_video_pixels = settings.max_video_pixels
        self._max_item_patches = settings.max_item_patches
        self._decoders = Workers(
            settings.decode_threads, "decode", waiting_for="to be decoded", max_waiting=settings.max_decoding
        )
        self._batcher: MicroBatcher[_Job, tuple[list[EncodedView], list[Note]]] = MicroBatcher(
            self._run,
            cost=lambda job: job.prepared.patches,
            max_batch_cost=settings.max_batch_patches or BATCH_PATCHES[tower.device.type],
            max_queue_cost=settings.max_queue_patches,
            max_wait_ms=settings.max_wait_ms,
            unit="patches",
        )
        self._decoders.watch()
        telemetry.watch("hiprune.queue.depth", lambda: self._batcher.depth, queue="vision")
        telemetry.measure("hiprune.queue.limit", settings.max_queue_patches, queue="vision")

    async def encode(
        self, media: media_pb2.Media, layers: Collection[int], *, aligned: bool, clock: StageClock
    ) -> Encoded:
        """The views of one image or video. Raises InvalidInput (`media.…`), Exhausted."""
        owner = auth.current().tenant.name
        with stage("preprocess"):
            prepared = await self._decoders.run_wanted(
                functools.partial(self._prepare, media),
                # nothing is decoded that would find no room, but for what others being decoded take
                check=lambda: self._batcher.check_room(owner),
            )
        job = _Job(prepared, frozenset(layers), aligned)
        return Encoded(await self._see(job, owner, clock), prepared.layout)

    async def _see(self, job: _Job, owner: str, clock: StageClock) -> list[EncodedView]:
        """A job's views, once its batch has run: the batch is in the trace of each request that is in it."""
        submitted_s = time.perf_counter()
        started: list[float] = []
        try:
            async with self._watch.looking():
                outcome = await self._batcher.submit(
                    job, owner, on_start=lambda: started.append(time.perf_counter())
                )
        except BaseException as error:
            at_s = started[0] if started else time.perf_counter()
            telemetry.record("queue", submitted_s, at_s - submitted_s, error=None if started else error)
            if started:
                telemetry.record("vision", at_s, time.perf_counter() - at_s, error=error)
            raise
        views, captured = outcome.result
        clock.add("queue", outcome.queued_s)
        clock.add("vision", outcome.ran_s)
        telemetry.record("queue", outcome.started_s - outcome.queued_s, outcome.queued_s)
        size = {"hiprune.batch.items": outcome.batch_size}
        vision = telemetry.record("vision", outcome.started_s, outcome.ran_s, attributes=size)
        for note in captured:
            layer = {"hiprune.layer": note.layer}
            telemetry.record("capture", note.started_s, note.seconds, attributes=layer, parent=vision)
        return views

    async def failed(self) -> str:
        """See `hiprune.server.CanFail`."""
        return await self._watch.failed()

    async def close(self) -> None:
        """Finishes what is queued."""
        await self._batcher.close()
        self._decoders.close()

    def _prepare(self, media: media_pb2.Media, is_wanted: Callable[[], bool]) -> Prepared:
        """Decoded and resized. Blocks. Raises InvalidInput, and Abandoned when nobody wants it any more."""
        if media.WhichOneof("content") == "image":
            outline = inspect(media.image, limits=self._limits, field="media.image")
            self._check_patches(outline.upright_size, None, "media.image")
            image = decode(outline, field="media.image")
            if not is_wanted():
                raise Abandoned
            return self._tower.prepare(image)
        video = media.video
        # all headers first: no frame is decoded of a video that is refused for a later one
        outlines = [
            inspect(frame, limits=self._limits, field=f"media.video.frames[{number}]")
            for number, frame in enumerate(video.frames)
        ]
        width, height = outlines[0].upright_size
        for number, outline in enumerate(outlines):
            if outline.upright_size != (width, height):
                raise InvalidInput(
                    "{} × {} pixels, expected {} × {} as in the first frame".format(
                        *outline.upright_size, width, height
                    ),
                    field=f"media.video.frames[{number}]",
                )
        if len(outlines) * width * height > self._max_video_pixels:
            raise InvalidInput(
                f"{len(outlines)} frames of {width} × {height} pixels, expected at most "
                f"{self._max_video_pixels} pixels in all frames together",
                field="media.video.frames",
                reason="LIMIT_EXCEEDED",
            )
        self._check_patches((width, height), len(outlines), "media.video.frames")
        frames = []
        for number, outline in enumerate(outlines):
            if not is_wanted():
                raise Abandoned
            frames.append(decode(outline, field=f"media.video.frames[{number}]"))
        rate = video.frames_per_second if video.HasField("frames_per_second") else DEFAULT_RATE
        return self._tower.prepare_video(frames, rate)

    def _check_patches(self, size: tuple[int, int], frames: int | None, field: str) -> None:
        """What the tower would compute, known before a pixel is. Raises InvalidInput."""
        patches = self._tower.patches(size, frames)
        if patches > self._max_item_patches:
            what = "{} × {} pixels are".format(*size)
            raise InvalidInput(
                f"{what if frames is None else f'{frames} frames of {what}'} {patches} patches, "
                f"expected at most {self._max_item_patches}",
                field=field,
                reason="LIMIT_EXCEEDED",
            )

    def _run(self, jobs: list[_Job]) -> list[tuple[list[EncodedView], list[Note]]]:
        """One forward, recording what any of the jobs wants; each gets its own layers and no more."""
        telemetry.observe("hiprune.batch.items", len(jobs))
        telemetry.observe("hiprune.batch.patches", sum(job.prepared.patches for job in jobs))
        layers = frozenset().union(*(job.layers for job in jobs))
        with telemetry.noting() as captured:
            items = self._tower.encode([job.prepared for job in jobs], layers, [job.aligned for job in jobs])
        return [(views, captured) for views in items]
