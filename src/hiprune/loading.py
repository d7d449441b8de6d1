"""Loads one part of a checkpoint, whole or not at all: into a transformers class, a module, or as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hiprune.checkpoints import CheckpointError, require_complete, stored_tensors


def load_part(model_class: Any, path: Path, *, part: str, **arguments: Any) -> Any:
    """`model_class.from_pretrained` of `path`, in eval mode and without gradients.

    A checkpoint holds more than the part, so transformers' report of what was left over is silenced;
    what is missing raises CheckpointError naming `part` and the keys. Weights stay memory-mapped
    unless `dtype` changes them.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            path, output_loading_info=True, local_files_only=True, use_safetensors=True, **arguments
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {part}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    require_complete(info, part=part, path=path)
    return model.eval().requires_grad_(False)


def load_module(
    make: Callable[[], torch.nn.Module],
    path: Path,
    prefixes: Sequence[str],
    *,
    part: str,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.nn.Module:
    """A module of a checkpoint, such as a projector, in eval mode and without gradients.

    `make` builds it, on no device at all; `prefixes` are what its keys may begin with on disk.
    Raises CheckpointError naming `part` and the key that is missing or has another shape.
    """
    with torch.device("meta"):
        module = make()
    expected = module.state_dict()
    wanted = {name: [prefix + name for prefix in prefixes] for name in expected}
    stored = read_tensors(path, wanted, part=part)
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {part}: {name} has shape {tuple(tensor.shape)}, "
                f"config.json says {tuple(expected[name].shape)}"
            )
    module.load_state_dict({name: each.to(device, dtype) for name, each in stored.items()}, assign=True)
    return module.eval().requires_grad_(False)


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
