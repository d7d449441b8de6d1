"""The language side of each model family: one adapter a family, in a module named like its facts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hiprune.checkpoints import Checkpoint, CheckpointError
from services.llm.placement import Placement


@dataclass(frozen=True, slots=True)
class SplicedPrompt:
    """A prompt as the language model sees it. S tokens of H channels."""

    embeddings: torch.Tensor
    """(S, H), in the language model's dtype and on its device."""
    positions: torch.Tensor
    """(S,) int64, on the same device; families with other positions have (axes, S)."""
    visual_tokens: int
    """Rows among them that stand for media."""


class Adapter(Protocol):
    """How one family's visual tokens enter its language model."""

    language_keys: Mapping[str, str]
    """Patterns of the language model's keys on disk and what stands in their place in its own class."""
    views: int
    """Views of one media item."""
    takes_video: bool

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """One media item's kept tokens, (K, D) in any float dtype, in the model's space, (K, H)."""

    def splice(
        self, token_ids: Sequence[int], embeddings: torch.Tensor, media: Sequence[torch.Tensor]
    ) -> SplicedPrompt:
        """The prompt of `token_ids`, whose `embeddings` are (T, H), with (K, H) rows for each image token."""


def load_adapter(checkpoint: Checkpoint, config: Any, placement: Placement) -> Adapter:
    """The adapter of a checkpoint, with its projector's weights. Raises CheckpointError."""
    family = checkpoint.facts.family
    try:
        module = importlib.import_module(f"{__name__}.{family}")
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint.path}: the language side of family {family!r} is not implemented"
        ) from error
    adapter: Adapter = module.load(checkpoint, config, placement)
    return adapter
