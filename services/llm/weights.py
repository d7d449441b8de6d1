"""A few tensors out of a checkpoint, by name, and nothing else of it. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hiprune.checkpoints import CheckpointError, stored_tensors


def read_tensors(path: Path, wanted: Mapping[str, Sequence[str]], *, part: str) -> dict[str, torch.Tensor]:
    """The wanted tensors by their name here, memory-mapped, in the dtype in which they are stored.

    `wanted` gives, for each, the keys under which the layouts on disk may have it. Raises CheckpointError
    naming what is missing; `part` says whose weights they are.
    """
    stored = {tensor.name: tensor for tensor in stored_tensors(path)}
    found: dict[str, torch.Tensor] = {}
    for name, keys in wanted.items():
        key = next((key for key in keys if key in stored), None)
        if key is None:
            raise CheckpointError(f"{path}: {part}: no tensor named {' or '.join(keys)}")
        try:
            with safe_open(stored[key].path, framework="pt") as file:
                found[name] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored[key].path}: {part}: {key}: {error}") from error
    return found
