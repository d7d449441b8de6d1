"""Visual tokens in the paired text encoder's space: CLIP's post_layernorm and visual_projection.

A product with the whole feature matrix belongs where the features are, so that the pruner only takes dot
products (HiPrune++, paper section 3.3).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

from hiprune.checkpoints import CheckpointError, read_json
from hiprune.loading import read_tensors

_NORM_WEIGHT = "vision_model.post_layernorm.weight"
_NORM_BIAS = "vision_model.post_layernorm.bias"
_PROJECTION = "visual_projection.weight"


class AlignedProjection:
    """The last two steps of a CLIP vision model, without the rest of it; float32."""

    def __init__(self, path: Path, device: torch.device, channels: int) -> None:
        """Reads three tensors of a CLIP directory, for a tower of `channels` D. Raises CheckpointError."""
        names = (_NORM_WEIGHT, _NORM_BIAS, _PROJECTION)
        stored = read_tensors(path, {name: [name] for name in names}, part="paired text encoder")
        loaded = {name: tensor.to(device, torch.float32) for name, tensor in stored.items()}
        self._weight, self._bias = loaded[_NORM_WEIGHT], loaded[_NORM_BIAS]  # (D,)
        self._projection = loaded[_PROJECTION]  # (A, D)
        self._epsilon = float(read_json(path / "config.json")["vision_config"].get("layer_norm_eps", 1e-5))
        if self._weight.shape[0] != channels:
            raise CheckpointError(
                f"{path}: paired text encoder: {self._weight.shape[0]} channels, expected {channels} "
                "as in the vision tower"
            )

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(N, D) of any float dtype to (N, A) float16, each row of length 1."""
        normed = functional.layer_norm(
            features.float(), self._weight.shape, self._weight, self._bias, self._epsilon
        )
        return functional.normalize(normed @ self._projection.T, dim=-1).half()
