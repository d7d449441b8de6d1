"""What the engine needs of a model family: load the tower, prepare pixels, run a batch.

A family's adapter is the module here that carries its name, with one function, `load`.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import torch
from PIL import Image

from hiprune import devices
from hiprune.checkpoints import Checkpoint
from hiprune.v1 import encoder_service_pb2

BLANK: Final = Image.new("RGB", (64, 64))
"""What towers warm up on."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One media item, ready for the tower, still on the CPU."""

    pixels: torch.Tensor  # float32, pinned for a GPU; (V, 3, h, w), or as the family packs its patches
    patches: int
    """What it costs: tokens that the tower will compute."""
    layout: encoder_service_pb2.MediaLayout = field(default_factory=encoder_service_pb2.MediaLayout)
    """What the language model needs to place the views."""


@dataclass(frozen=True, slots=True)
class EncodedView:
    """One grid of visual tokens. N = H·W, row-major."""

    features: torch.Tensor  # (N, D) in the tower's dtype
    scores: Mapping[int, torch.Tensor]  # 1-based layer → (N,) float32
    grid: tuple[int, int]  # H, W
    aligned: torch.Tensor | None = None  # (N, A) float16
    prefix: torch.Tensor | None = field(default=None)  # (P, D): tokens outside the grid
    frame: int = 0
    valid: tuple[int, int, int, int] | None = None
    """Top, left, height, width of the part that is not padding, in tokens; None: all of it."""
    cls_scores: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """1-based layer → (N,) float32: attention from CLS alone; of a tower without CLS, none."""


class Tower(Protocol):
    """A loaded vision tower."""

    device: torch.device
    dtype: torch.dtype
    """Of the features."""

    def patches(self, size: tuple[int, int], frames: int | None = None) -> int:
        """What `prepare` would say that an image of so many pixels (width, height) costs, or `prepare_video`
        that so many frames do. Knows from the size alone, so that limits come before any pixel."""

    def prepare(self, image: Image.Image) -> Prepared:
        """Pixels of an image for the tower. Called on several threads at once."""

    def prepare_video(self, frames: Sequence[Image.Image], frames_per_second: float) -> Prepared:
        """Pixels of a video, all frames of one size. Called only where the family's facts take video."""

    def encode(
        self, items: Sequence[Prepared], layers: Collection[int], aligned: Sequence[bool]
    ) -> list[list[EncodedView]]:
        """The views of each item, on the CPU. `aligned` says for each item whether it is wanted."""

    def warm_up(self, layers: Collection[int]) -> None:
        """Runs what requests will run, recording `layers`: the first forward picks kernels and allocates."""


def load_tower(
    checkpoint: Checkpoint, paired: Path | None, device: torch.device, dtype: torch.dtype
) -> Tower:
    """The tower of a checkpoint, through its family's adapter. Raises CheckpointError."""
    devices.settle(device)
    adapter = importlib.import_module(f"{__name__}.{checkpoint.facts.family}")
    tower: Tower = adapter.load(checkpoint, paired, device, dtype)
    return tower
