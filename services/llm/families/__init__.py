"""The language side of each model family: one adapter a family, in a module named like its facts."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch

from hiprune.checkpoints import Checkpoint, CheckpointError
from hiprune.config import ConfigError
from services.llm.placement import Placement
from services.llm.visual import VisualTokens


@dataclass(frozen=True, slots=True)
class SplicedPrompt:
    """A prompt as the language model sees it. S tokens of H channels."""

    embeddings: torch.Tensor
    """(S, H), in the language model's dtype and on its device."""
    positions: torch.Tensor
    """(S,) int64, on the same device; families with other positions have (axes, S)."""
    visual_tokens: int
    """Rows among them that stand for media."""
    media_end: int = 0
    """Where the last medium's rows end; 0 without media."""


@dataclass(frozen=True, slots=True)
class LanguagePart:
    """Which transformers class holds the language model, and how its weights are found on disk."""

    model_class: Any
    config: Any
    key_mapping: Mapping[str, str]
    """Patterns of keys on disk and what stands in their place in `model_class`."""


class Adapter(Protocol):
    """How one family's visual tokens enter its language model."""

    language: LanguagePart
    image_token_id: int
    video_token_id: int | None
    """What stands for a video in a prompt; None where the family takes none."""

    def check(self, media: VisualTokens) -> None:
        """Refuses views or a layout that this family's media cannot have. Raises InvalidInput."""

    def project(self, media: VisualTokens) -> torch.Tensor:
        """One media item's rows in the model's space, (R, H), in the order in which they enter the prompt.

        Of that item alone, so that its bits do not depend on its neighbours.
        """

    def splice(
        self,
        token_ids: Sequence[int],
        embeddings: torch.Tensor,
        rows: Sequence[torch.Tensor],
        media: Sequence[VisualTokens],
    ) -> SplicedPrompt:
        """The prompt of `token_ids` and their `embeddings` (T, H), each placeholder replaced by its rows."""


@runtime_checkable
class HasNewlines(Protocol):
    """An adapter whose model has an embedding that ends a row of tiles."""

    def with_newline_rows(self) -> Self:
        """The same adapter with a newline behind each row of a pruned image that keeps a token."""


def splice_rows(
    token_ids: Sequence[int],
    embeddings: torch.Tensor,
    rows: Sequence[torch.Tensor],
    placeholders: Collection[int],
) -> SplicedPrompt:
    """Each placeholder gives way to its rows (R, H); positions count on over them, from 0 to S-1."""
    pieces: list[torch.Tensor] = []
    waiting = iter(rows)
    start = media_end = 0
    for index, token_id in enumerate(token_ids):
        if token_id in placeholders:
            pieces += [embeddings[start:index], next(waiting)]
            media_end += len(pieces[-2]) + len(pieces[-1])
            start = index + 1
    pieces.append(embeddings[start:])
    spliced = torch.cat(pieces)  # (S, H)
    return SplicedPrompt(
        embeddings=spliced,
        positions=torch.arange(len(spliced), device=spliced.device),
        visual_tokens=sum(len(each) for each in rows),
        media_end=media_end,
    )


def load_adapter(
    checkpoint: Checkpoint,
    config: Any,
    placement: Placement,
    newlines: Literal["none", "rows"] = "none",
) -> Adapter:
    """The adapter of a checkpoint, with its projector's weights. Raises CheckpointError, ConfigError."""
    family = checkpoint.facts.family
    try:
        module = importlib.import_module(f"{__name__}.{family}")
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint.path}: the language side of family {family!r} is not implemented"
        ) from error
    adapter: Adapter = module.load(checkpoint, config, placement)
    if newlines == "none":
        return adapter
    if not isinstance(adapter, HasNewlines):
        raise ConfigError(f"newlines (--newlines): got {newlines!r}, and the {family} family has none")
    with_newlines: Adapter = adapter.with_newline_rows()
    return with_newlines
