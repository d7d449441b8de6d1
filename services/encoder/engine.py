"""From encoded bytes to views: decode and resize on a thread pool, the tower on one thread, in batches.

Knows no gRPC and no family: a family's adapter gives the tower.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from hiprune import auth, telemetry
from hiprune.errors import Exhausted, InvalidInput
from hiprune.fairness import Turns
from hiprune.telemetry import Note, StageClock, stage
from hiprune.v1 import encoder_service_pb2, media_pb2
from services.encoder.batching import MicroBatcher
from services.encoder.families import EncodedView, Prepared, Tower
from services.encoder.images import ImageLimits, decode, decode_image, inspect
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
        self._limits = ImageLimits(
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            max_side=settings.max_image_side,
        )
        self._max_video_pixels = settings.max_video_pixels
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._decoding = Turns(settings.decode_threads, settings.max_decoding, self._too_many)
        self._max_decoding = settings.max_decoding
        self._batcher: MicroBatcher[_Job, tuple[list[EncodedView], list[Note]]] = MicroBatcher(
            self._run,
            cost=lambda job: job.prepared.patches,
            max_batch_cost=settings.max_batch_patches or BATCH_PATCHES[tower.device.type],
            max_queue_cost=settings.max_queue_patches,
            max_wait_ms=settings.max_wait_ms,
        )
        telemetry.watch("hiprune.queue.depth", lambda: self._decoding.waiting, queue="decode")
        telemetry.measure("hiprune.queue.limit", settings.max_decoding, queue="decode")
        telemetry.watch("hiprune.queue.depth", lambda: self._batcher.depth, queue="vision")
        telemetry.measure("hiprune.queue.limit", settings.max_queue_patches, queue="vision")

    async def encode(
        self, media: media_pb2.Media, layers: Collection[int], *, aligned: bool, clock: StageClock
    ) -> Encoded:
        """The views of one image or video. Raises InvalidInput (`media.…`), Exhausted."""
        owner = auth.current().tenant.name
        with stage("preprocess"):
            async with self._decoding.take(owner):
                loop = asyncio.get_running_loop()
                prepared = await loop.run_in_executor(self._decoders, self._prepare, media)
        job = _Job(prepared, frozenset(layers), aligned)
        return Encoded(await self._see(job, owner, clock), prepared.layout)

    async def _see(self, job: _Job, owner: str, clock: StageClock) -> list[EncodedView]:
        """A job's views, once its batch has run: the batch is in the trace of each request that is in it."""
        submitted_s = time.perf_counter()
        started: list[float] = []
        try:
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

    def _too_many(self) -> Exhausted:
        return Exhausted(
            f"{self._decoding.waiting} images wait to be decoded, at most {self._max_decoding} may",
            retry_after_s=1,
        )

    async def close(self) -> None:
        """Finishes what is queued."""
        await self._batcher.close()
        self._decoders.shutdown(wait=False)

    def _prepare(self, media: media_pb2.Media) -> Prepared:
        """Decoded and resized. Blocks."""
        if media.WhichOneof("content") == "image":
            return self._tower.prepare(decode_image(media.image, limits=self._limits, field="media.image"))
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
        frames = [
            decode(outline, field=f"media.video.frames[{number}]") for number, outline in enumerate(outlines)
        ]
        rate = video.frames_per_second if video.HasField("frames_per_second") else DEFAULT_RATE
        return self._tower.prepare_video(frames, rate)

    def _run(self, jobs: list[_Job]) -> list[tuple[list[EncodedView], list[Note]]]:
        """One forward, recording what any of the jobs wants; each gets its own layers and no more."""
        telemetry.observe("hiprune.batch.items", len(jobs))
        telemetry.observe("hiprune.batch.patches", sum(job.prepared.patches for job in jobs))
        layers = frozenset().union(*(job.layers for job in jobs))
        with telemetry.noting() as captured:
            items = self._tower.encode([job.prepared for job in jobs], layers, [job.aligned for job in jobs])
        return [(views, captured) for views in items]
