"""Visual tokens in the paired text encoder's space: CLIP's post_layernorm and visual_projection.

A product with the whole feature matrix belongs where the features are, so that the pruner only takes dot
products (HiPrune++, paper section 3.3).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn import functional

from hiprune.checkpoints import CheckpointError, read_json, stored_tensors

_NORM_WEIGHT = "vision_model.post_layernorm.weight"
_NORM_BIAS = "vision_model.post_layernorm.bias"
_PROJECTION = "visual_projection.weight"


class AlignedProjection:
    """The last two steps of a CLIP vision model, without the rest of it; float32."""

    def __init__(self, path: Path, device: torch.device, channels: int) -> None:
        """Reads three tensors of a CLIP directory, for a tower of `channels` D. Raises CheckpointError."""
        where = {tensor.name: tensor.path for tensor in stored_tensors(path)}
        loaded = {}
        for name in (_NORM_WEIGHT, _NORM_BIAS, _PROJECTION):
            if name not in where:
                raise CheckpointError(f"{path}: paired text encoder: missing key: {name}")
            with safe_open(where[name], "pt") as file:
                loaded[name] = file.get_tensor(name).to(device, torch.float32)
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
