"""Attention from the CLS token alone, which some other methods rank tokens by: for comparison, offline.

The service scores a token by what it receives from all tokens. Here one row of the same attention is taken,
from the queries and keys that the layer computes. Knows no method.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from hiprune.checkpoints import Checkpoint
from services.encoder.families import load_tower

Scores = npt.NDArray[np.float32]


class ClsRows:
    """A CLIP tower of a LLaVA checkpoint, in float32 on the CPU."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Loads the tower. Raises CheckpointError; ValueError for a tower that has no CLS."""
        tower: Any = load_tower(checkpoint, None, torch.device("cpu"), torch.float32)
        self._tower = tower
        body = getattr(tower.model, "vision_model", tower.model)
        if not hasattr(body.embeddings, "class_embedding"):
            raise ValueError(f"{checkpoint.path}: the tower has no CLS token")
        self._attention = {
            number: layer.self_attn for number, layer in enumerate(body.encoder.layers, start=1)
        }

    @torch.inference_mode()
    def of(self, image: bytes) -> Mapping[int, Scores]:
        """For each layer the CLS query's attention probabilities over patches, mean over heads, (N,)."""
        rows: dict[int, Scores] = {}
        hooks = [
            module.register_forward_pre_hook(_recorder(rows, layer), with_kwargs=True)
            for layer, module in self._attention.items()
        ]
        try:
            self._tower.model(pixel_values=self.pixels(image))
        finally:
            for hook in hooks:
                hook.remove()
        return rows

    def pixels(self, image: bytes) -> torch.Tensor:
        """What the tower sees, (1, 3, h, w) float32."""
        with Image.open(io.BytesIO(image)) as picture:
            found: torch.Tensor = self._tower.prepare(picture.convert("RGB")).pixels
        return found


def _recorder(rows: dict[int, Scores], layer: int) -> Any:
    """A hook that puts a layer's row into `rows`."""

    def record(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = arguments[0] if arguments else named["hidden_states"]  # (1, 1 + N, D)
        query, key = module.q_proj(hidden[:, :1]), module.k_proj(hidden)
        queries, keys = (
            each[0].unflatten(-1, (module.num_heads, -1)).transpose(0, 1) for each in (query, key)
        )
        logits = queries @ keys.mT * module.scale  # (heads, 1, 1 + N)
        rows[layer] = logits.softmax(-1).mean(0)[0, 1:].numpy()

    return record
