"""The pruner as a process: what it loads and what it is made of."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence

import grpc
import torch

from hiprune import checkpoints
from hiprune.client import connect
from hiprune.v1 import encoder_service_pb2_grpc, pruner_service_pb2_grpc
from services.pruner.cache import ModelIdentity, TokenCache
from services.pruner.service import PrunerServicer
from services.pruner.settings import Settings
from services.pruner.stores import MemoryStore, NoStore, RedisStore, Store
from services.pruner.text import PairedTextEncoder

log = logging.getLogger("hiprune.pruner")


class PrunerService:
    """The pruner as a process: see `hiprune.server.Service`."""

    names: Sequence[str] = ("hiprune.v1.PrunerService",)

    def __init__(self, settings: Settings) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._settings = settings
        self._checkpoint = checkpoints.open_checkpoint(settings.model)
        paired = checkpoints.locate_paired(settings.paired_model, self._checkpoint)
        text = PairedTextEncoder(paired) if paired else None
        if text is None:
            log.warning("no paired text encoder: HIPRUNE_PLUS_PLUS takes no question here")
        identity = ModelIdentity(
            self._checkpoint.vision_digest,
            self._checkpoint.preprocessing_digest,
            text.digest if text else "",
            self._checkpoint.facts.grid,
        )
        cache = TokenCache(
            open_store(settings),
            # alone in this process, a secret of the moment isolates as well as a shared one
            secret=settings.cache_secret.get_secret_value().encode() or secrets.token_bytes(32),
            model=identity,
            max_value_bytes=settings.cache_value_bytes,
        )
        self._channel = connect(settings.encoder, max_message_bytes=settings.max_message_bytes)
        stub = encoder_service_pb2_grpc.EncoderServiceStub(self._channel)
        self._servicer = PrunerServicer(settings, self._checkpoint, text, cache, stub)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the servicer."""
        pruner_service_pb2_grpc.add_PrunerServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Ready at once: the encoder may come later."""

    async def stop(self) -> None:
        """Finishes what is being cached and hangs up."""
        await self._servicer.close()
        await self._channel.close()


def open_store(settings: Settings) -> Store:
    """The store that the settings name."""
    match settings.cache:
        case "redis":
            return RedisStore(
                settings.redis_url.get_secret_value(),
                ttl_s=settings.cache_ttl_s,
                timeout_s=settings.cache_timeout_ms / 1000,
            )
        case "memory":
            return MemoryStore(settings.cache_bytes, settings.cache_ttl_s)
        case _:
            return NoStore()
