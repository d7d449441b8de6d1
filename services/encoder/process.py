"""The encoder as a process: what it loads, and where it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

import grpc
import torch

from hiprune import checkpoints, devices, tensors
from hiprune.checkpoints import Checkpoint
from hiprune.config import ConfigError
from hiprune.errors import Unavailable
from hiprune.intake import SMALL_REQUEST
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc
from services.encoder.engine import VisionEngine
from services.encoder.families import BLANK, Tower, load_tower
from services.encoder.service import EncoderServicer
from services.encoder.settings import Settings

log = logging.getLogger("hiprune.encoder")


class EncoderService:
    """See `hiprune.server.Service`."""

    names: Sequence[str] = ("hiprune.v1.EncoderService",)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._servicer = EncoderServicer(settings)
        self._engine: VisionEngine | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the servicer."""
        encoder_service_pb2_grpc.add_EncoderServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Loads the tower and runs it once."""
        checkpoint, fingerprint, tower = await asyncio.to_thread(_load, self._settings)
        self._engine = VisionEngine(tower, self._settings)
        self._servicer.equip(checkpoint, fingerprint, self._engine)

    async def failed(self) -> str:
        """See `hiprune.server.CanFail`."""
        if self._engine is None:
            raise Unavailable("the vision tower is loading", reason="NOT_READY", retry_after_s=1)
        return await self._engine.failed()

    async def stop(self) -> None:
        """Finishes what is queued, and takes back what is lent."""
        if self._engine is not None:
            await self._engine.close()
        await self._servicer.close()

    def request_bytes(self) -> Mapping[str, int]:
        """See `hiprune.server.Service`."""
        return {
            "/hiprune.v1.EncoderService/EncodeImage": self._settings.max_request_bytes,
            "/hiprune.v1.EncoderService/GetEncoder": SMALL_REQUEST,
        }


def _load(settings: Settings) -> tuple[Checkpoint, encoder_service_pb2.ModelFingerprint, Tower]:
    """The checkpoint, its identity, and the tower, warm. Blocks. Raises CheckpointError, ConfigError."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device, dtype = choose_device(settings)
    devices.bound_memory(device, settings.gpu_memory_fraction)
    checkpoint = checkpoints.open_checkpoint(settings.model)
    paired = checkpoints.locate_paired(settings.paired_model, checkpoint)
    facts = checkpoint.facts
    fingerprint = encoder_service_pb2.ModelFingerprint(
        family=facts.family,
        vision_digest=checkpoint.vision_digest,
        preprocessing_digest=checkpoint.preprocessing_digest,
        dtype=tensors.WIRE_DTYPES[dtype],
        hidden_size=facts.hidden_size,
        layers=facts.layers,
        paired_digest=checkpoints.text_digest(checkpoint, paired),
    )
    tower = load_tower(checkpoint, paired, device, dtype)
    # the first forward picks kernels and allocates; better now than in somebody's request
    layers = {facts.object_layer, facts.deep_layer}
    tower.warm_up(layers)
    tower.encode([tower.prepare(BLANK)], layers, [bool(fingerprint.paired_digest)])
    return checkpoint, fingerprint, tower


def choose_device(settings: Settings) -> tuple[torch.device, torch.dtype]:
    """Where the tower runs and in what type, and says why. Raises ConfigError for a GPU that is not there."""
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device (--device): got {settings.device!r}, and torch sees no CUDA device")
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
    else:
        # half precision on a CPU is emulated: slower, and less exact
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    log.info("tower on %s in %s", device, str(dtype).removeprefix("torch."))
    return device, dtype
