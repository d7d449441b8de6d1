"""The language-model service as a process: loads, serves, leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import grpc
import torch

from hiprune import devices
from hiprune.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from hiprune.config import ConfigError
from hiprune.costs import TextShape
from hiprune.errors import Unavailable
from hiprune.intake import ROOM, SMALL_REQUEST
from hiprune.server import CanFail
from hiprune.v1 import llm_service_pb2_grpc
from services.llm.chat import load_chat
from services.llm.engines.adapters import LoraAdapter, read_adapters, refuse_adapters
from services.llm.engines.base import Engine
from services.llm.engines.transformers import TransformersEngine
from services.llm.families import Adapter, load_adapter
from services.llm.pipeline import LanguageModel
from services.llm.placement import Placement, place
from services.llm.prompts import Limits
from services.llm.pruner import Pruner
from services.llm.service import ImageQaServicer, LanguageModelServicer
from services.llm.settings import Settings
from services.llm.slots import Slots

NAMES: Final = ("hiprune.v1.LanguageModelService", "hiprune.v1.ImageQaService")


class LlmService:
    """What `hiprune.server` runs: loads, serves, leaves."""

    names: Sequence[str] = NAMES

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._model: LanguageModel | None = None
        self._pruner: Pruner | None = None

    def register(self, grpc_server: grpc.aio.Server) -> None:
        """Adds both servicers."""
        llm_service_pb2_grpc.add_LanguageModelServiceServicer_to_server(
            LanguageModelServicer(self.loaded), grpc_server
        )
        llm_service_pb2_grpc.add_ImageQaServiceServicer_to_server(
            ImageQaServicer(self.loaded, self.pruner), grpc_server
        )

    async def start(self) -> None:
        """Loads the model and generates once. The pruner need not be there."""
        self._pruner = Pruner(self._settings)
        model = await asyncio.to_thread(load, self._settings)
        await model.engine.start()
        self._model = model

    async def stop(self) -> None:
        """Ends what still generates and closes the channel to the pruner."""
        if self._pruner is not None:
            await self._pruner.close()
        if self._model is not None:
            await self._model.engine.stop()

    async def failed(self) -> str:
        """See `hiprune.server.CanFail`: a GPU may be lost, and an engine apart may end by itself."""
        model = self.loaded()
        parts = [part for part in (model.watch, model.engine) if isinstance(part, CanFail)]
        waiting = [asyncio.create_task(part.failed()) for part in parts]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in waiting:
                task.cancel()

    def request_bytes(self) -> Mapping[str, int]:
        """See `hiprune.server.Service`: a conversation with media, or with all rows that fit a prompt."""
        settings, model = self._settings, self.loaded()
        facts = model.checkpoint.facts
        one = max(settings.max_image_bytes, settings.max_video_bytes if facts.takes_video else 0)
        text = 4 * settings.max_text_chars + ROOM
        # four bytes a channel at most; indices, kinds and scores of all tokens that there were
        rows = model.engine.context_length * 4 * facts.hidden_size + settings.max_media * ROOM
        return {
            "/hiprune.v1.ImageQaService/AskImage": settings.max_media * one + text,
            "/hiprune.v1.LanguageModelService/GenerateText": rows + text,
            "/hiprune.v1.LanguageModelService/GetLanguageModel": SMALL_REQUEST,
        }

    def loaded(self) -> LanguageModel:
        """The language model. Raises Unavailable until it is loaded."""
        if self._model is None:
            raise Unavailable("the language model is loading", reason="NOT_READY", retry_after_s=1)
        return self._model

    def pruner(self) -> Pruner:
        """The channel to the pruner. Raises Unavailable before `start`."""
        if self._pruner is None:
            raise Unavailable("the service is starting", reason="NOT_READY", retry_after_s=1)
        return self._pruner


def load(settings: Settings) -> LanguageModel:
    """Everything but the engine's weights, which its `start` loads. Blocks.

    Raises CheckpointError, ConfigError.
    """
    checkpoint = open_checkpoint(settings.model)
    # seconds to import: done here, in a thread, while the port already answers health
    from transformers import AutoConfig

    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: config.json: {error}") from error
    placement = place(settings.device, settings.dtype, config.dtype)
    if settings.engine == "transformers":
        devices.bound_memory(placement.device, settings.gpu_memory_utilization)
        devices.settle(placement.device)
    adapter = load_adapter(checkpoint, config, placement, settings.newlines)
    name = settings.model_name or _name(settings.model, checkpoint.name)
    if settings.engine != "vllm":
        refuse_adapters(settings.lora_adapters, settings.engine)
    loras = read_adapters(settings.lora_adapters, name)
    return LanguageModel(
        name=name,
        checkpoint=checkpoint,
        chat=load_chat(checkpoint.path, adapter.image_token_id, adapter.video_token_id),
        adapter=adapter,
        engine=make_engine(settings, checkpoint, adapter, placement, loras),
        shape=TextShape.of(config.get_text_config().to_dict()),
        limits=Limits(
            settings.max_messages,
            settings.max_media,
            settings.max_text_chars,
            settings.max_image_bytes,
            settings.max_video_bytes,
        ),
        max_new_tokens=settings.max_new_tokens,
        slots=Slots(settings.max_concurrency, settings.max_queue),
        watch=devices.Watch(placement.device),
        adapters=tuple(each.name for each in loras),
    )


def make_engine(
    settings: Settings,
    checkpoint: Checkpoint,
    adapter: Adapter,
    placement: Placement,
    loras: Sequence[LoraAdapter] = (),
) -> Engine:
    """The engine that the settings name, not started. Raises CheckpointError, ConfigError."""
    if settings.engine == "transformers":
        return TransformersEngine(checkpoint.path, adapter.language, placement, settings.max_concurrency)
    if settings.engine == "vllm-http":
        from services.llm.engines.vllm_http import VllmHttpEngine

        return VllmHttpEngine(
            checkpoint.path,
            adapter.language,
            placement,
            settings.max_concurrency,
            settings.url,
            settings.url_key.get_secret_value(),
        )
    try:
        from services.llm.engines.vllm import VllmEngine

        return VllmEngine(
            checkpoint.path,
            adapter.language,
            placement,
            settings.max_concurrency,
            settings.vllm_arguments,
            loras,
        )
    except ImportError as error:
        raise ConfigError(
            f"engine (--engine): got 'vllm', which is not installed here ({error}): docs/scaling.md says how"
        ) from error


def _name(model: str, directory: str) -> str:
    """What clients call it: the directory's name, or the hub id, whose directory is named by a commit."""
    return directory if Path(model).expanduser().is_dir() else model
