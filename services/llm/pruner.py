"""The pruner, as this service calls it: each media item of a conversation, all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hiprune import telemetry
from hiprune.calls import Peer
from hiprune.errors import HipruneError
from hiprune.v1 import llm_service_pb2, pruner_service_pb2, pruner_service_pb2_grpc
from services.llm.prompts import MediaItem
from services.llm.settings import Settings


class Pruner:
    """Calls to the pruner."""

    def __init__(self, settings: Settings) -> None:
        """Connects when first used. Raises ConfigError for certificates that cannot be used."""
        self._peer = Peer("pruner", settings.pruner, pruner_service_pb2_grpc.PrunerServiceStub, settings)

    async def close(self) -> None:
        """Closes the channel; running calls are cancelled."""
        await self._peer.close()

    async def prune(
        self, items: Sequence[MediaItem], policy: pruner_service_pb2.PrunePolicy
    ) -> tuple[list[pruner_service_pb2.PrunedMedia], llm_service_pb2.PruningReport]:
        """All media, pruned, and the report on them, both in the order of the conversation.

        The first error ends the others' work. Raises the pruner's error, its field as the client knows it.
        """
        tasks = [asyncio.create_task(self._prune_one(item, policy)) for item in items]
        try:
            pruned = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        report = llm_service_pb2.PruningReport(media=[entry for _, entry in pruned])
        return [media for media, _ in pruned], report

    async def _prune_one(
        self, item: MediaItem, policy: pruner_service_pb2.PrunePolicy
    ) -> tuple[pruner_service_pb2.PrunedMedia, llm_service_pb2.MediaReport]:
        # this task's own clock: the stages of one media item
        clock = telemetry.start_clock()
        request = pruner_service_pb2.PruneImageRequest(
            media=item.part.media, policy=policy, question=item.question
        )
        try:
            with telemetry.stage("prune"):
                response = await self._peer.call(
                    lambda stub: stub.PruneImage, request, pruner_service_pb2.PruneImageResponse
                )
        except HipruneError as error:
            raise _as_asked(error, item) from error
        clock.extend(response.timings)
        entry = llm_service_pb2.MediaReport(
            views=[view.selection for view in response.media.views],
            summary=response.media.summary,
            cache=response.cache,
            timings=clock.to_proto(),
            layout=response.media.layout,
        )
        return response.media, entry


def _as_asked(error: HipruneError, item: MediaItem) -> HipruneError:
    """A pruner's error with the field that the client sent: its `media` is a part, its `policy` is ours."""
    root = error.field.partition(".")[0]
    if root == "media":
        return error.under(item.field)
    if root == "question":
        return type(error)(
            error.message, reason=error.reason, field=item.question_field, retry_after_s=error.retry_after_s
        )
    return error
