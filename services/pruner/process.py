"""The pruner as a process: what it loads and what it is made of."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import Message

from hiprune import checkpoints
from hiprune.calls import Peer
from hiprune.checkpoints import Checkpoint
from hiprune.config import ConfigError
from hiprune.intake import ROOM, SMALL_REQUEST
from hiprune.redis_clients import EXPECTED
from hiprune.v1 import encoder_service_pb2_grpc, pruner_service_pb2
from services.pruner.cache import ModelIdentity, TokenCache
from services.pruner.encoder import RemoteEncoder
from services.pruner.redis_store import RedisStore
from services.pruner.service import PrunerServicer
from services.pruner.settings import Settings
from services.pruner.stores import MemoryStore, NoStore, Store

if TYPE_CHECKING:
    from services.pruner.text import TextEncoder

log = logging.getLogger("hiprune.pruner")


class PrunerService:
    """The pruner as a process: see `hiprune.server.Service`."""

    names: Sequence[str] = ("hiprune.v1.PrunerService",)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._servicer = PrunerServicer(settings)
        self._encoder: Peer[encoder_service_pb2_grpc.EncoderServiceAsyncStub] | None = None
        self._takes_video = False

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the servicer: by hand, as its large answers are bytes already."""
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(self._servicer, name),
                request_deserializer=getattr(pruner_service_pb2, f"{name}Request").FromString,
                response_serializer=_serialised,
            )
            for name in ("GetPruner", "PruneTokens", "PruneImage")
        }
        (name,) = self.names
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

    async def start(self) -> None:
        """Loads the text encoder. Ready without the encoder, which may come later."""
        settings = self._settings
        checkpoint, text = await asyncio.to_thread(_load, settings)
        self._takes_video = checkpoint.facts.takes_video
        identity = ModelIdentity(
            checkpoint.vision_digest,
            checkpoint.preprocessing_digest,
            text.digest if text else "",
            checkpoint.facts.fixed_tokens,
        )
        cache = TokenCache(
            open_store(settings),
            # alone in this process, a secret of the moment isolates as well as a shared one
            secret=settings.cache_secret.get_secret_value().encode() or secrets.token_bytes(32),
            model=identity,
            max_value_bytes=settings.cache_value_bytes,
        )
        self._encoder = Peer(
            "encoder", settings.encoder, encoder_service_pb2_grpc.EncoderServiceStub, settings
        )
        encoder = RemoteEncoder(self._encoder, checkpoint, text.digest if text else "", settings)
        self._servicer.equip(checkpoint, text, cache, encoder)

    async def stop(self) -> None:
        """Finishes what is being cached and hangs up."""
        await self._servicer.close()
        if self._encoder is not None:
            await self._encoder.close()

    def request_bytes(self) -> Mapping[str, int]:
        """See `hiprune.server.Service`: an image or a video with its question; anybody's tokens."""
        settings = self._settings
        media = max(settings.max_image_bytes, settings.max_video_bytes if self._takes_video else 0)
        return {
            "/hiprune.v1.PrunerService/PruneImage": media + 4 * settings.max_text_chars + ROOM,
            "/hiprune.v1.PrunerService/PruneTokens": settings.max_message_bytes,
            "/hiprune.v1.PrunerService/GetPruner": SMALL_REQUEST,
        }


def _serialised(answer: Message | bytes) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


def _load(settings: Settings) -> tuple[Checkpoint, TextEncoder | None]:
    """The checkpoint's identity and what reads questions for it. Blocks. Raises CheckpointError."""
    # torch and transformers take seconds to import: here, while the port already answers health
    import torch

    from services.pruner.text import LanguageSpace, PairedTextEncoder

    if settings.threads:
        torch.set_num_threads(settings.threads)
    checkpoint = checkpoints.open_checkpoint(settings.model)
    if checkpoint.facts.text_keys is not None:
        return checkpoint, LanguageSpace(checkpoint)
    paired = checkpoints.locate_paired(settings.paired_model, checkpoint)
    if paired is None:
        log.warning("no paired text encoder: HIPRUNE_PLUS_PLUS takes no question here")
        return checkpoint, None
    text = PairedTextEncoder(paired)
    text.encode("warm up")  # the first forward allocates; better now than in somebody's request
    return checkpoint, text


def open_store(settings: Settings) -> Store:
    """The store that the settings name. Raises ConfigError."""
    match settings.cache:
        case "redis":
            try:
                return RedisStore(
                    settings.redis_url.get_secret_value(),
                    ttl_s=settings.cache_ttl_s,
                    timeout_s=settings.cache_timeout_ms / 1000,
                    share_bytes=settings.cache_tenant_bytes,
                    max_value_bytes=settings.cache_value_bytes,
                )
            except (ValueError, TypeError):
                raise ConfigError(
                    f"redis_url (--redis-url, HIPRUNE_PRUNER_REDIS_URL): got a secret, expected {EXPECTED}"
                ) from None  # the cause holds parts of the URL, and so of its password
        case "memory":
            return MemoryStore(
                settings.cache_bytes, settings.cache_ttl_s, share_bytes=settings.cache_tenant_bytes
            )
        case _:
            return NoStore()
