"""The input embeddings of a checkpoint, alone: rows of a memory-mapped table. Knows no engine.

An engine in a process of its own keeps the model's weights there; what is spliced here needs rows of one of
its matrices. Mapped, the table costs the pages that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from hiprune.loading import read_tensors
from services.llm.placement import Placement

_KEYS: Final = (
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "model.embed_tokens.weight",
)
"""Where the layouts on disk have it."""


class EmbeddingTable:
    """Rows (H,) by token."""

    def __init__(self, path: Path, placement: Placement) -> None:
        """Maps the table. Raises CheckpointError."""
        (self._table,) = read_tensors(path, {"embed_tokens": _KEYS}, part="input embeddings").values()
        self._placement = placement

    @property
    def width(self) -> int:
        """H."""
        return int(self._table.shape[1])

    def rows(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Embeddings (T, H) in the placement's dtype, on its device. Blocks while pages are read."""
        ids = torch.tensor(list(token_ids), dtype=torch.long)  # (T,)
        return self._table[ids].to(self._placement.device, self._placement.dtype)
