"""From encoded bytes to views: decode and resize on a thread pool, the tower on one thread, in batches.

Knows no gRPC and no family: a family's adapter gives the tower.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hiprune.telemetry import StageClock, stage
from services.encoder.batching import MicroBatcher
from services.encoder.families import EncodedView, Prepared, Tower
from services.encoder.images import ImageLimits, decode_image
from services.encoder.settings import Settings


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
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._batcher: MicroBatcher[_Job, list[EncodedView]] = MicroBatcher(
            self._run,
            cost=lambda job: job.prepared.patches,
            max_batch_cost=settings.max_batch_patches,
            max_queue_cost=settings.max_queue_patches,
            max_wait_ms=settings.max_wait_ms,
        )

    async def encode(
        self, data: bytes, layers: Collection[int], *, aligned: bool, clock: StageClock
    ) -> list[EncodedView]:
        """The views of one image file. Raises InvalidInput (`media.image`), Exhausted."""
        with stage("preprocess"):
            loop = asyncio.get_running_loop()
            prepared = await loop.run_in_executor(self._decoders, self._prepare, data)
        outcome = await self._batcher.submit(_Job(prepared, frozenset(layers), aligned))
        clock.add("queue", outcome.queued_s)
        clock.add("vision", outcome.ran_s)
        return outcome.result

    async def close(self) -> None:
        """Finishes what is queued."""
        await self._batcher.close()
        self._decoders.shutdown(wait=False)

    def _prepare(self, data: bytes) -> Prepared:
        return self._tower.prepare(decode_image(data, limits=self._limits, field="media.image"))

    def _run(self, jobs: list[_Job]) -> list[list[EncodedView]]:
        """One forward, recording what any of the jobs wants; each gets its own layers and no more."""
        layers = frozenset().union(*(job.layers for job in jobs))
        items = self._tower.encode([job.prepared for job in jobs], layers, [job.aligned for job in jobs])
        return items
