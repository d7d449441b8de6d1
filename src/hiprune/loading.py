"""Loads one part of a checkpoint into a transformers class, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hiprune.checkpoints import CheckpointError, require_complete


def load_part(model_class: Any, path: Path, *, part: str, **arguments: Any) -> Any:
    """`model_class.from_pretrained` of `path`, in eval mode and without gradients.

    A checkpoint holds more than the part, so transformers' report of what was left over is silenced;
    what is missing raises CheckpointError naming `part` and the keys. Weights stay memory-mapped
    unless `dtype` changes them.
    """
    from safetensors import SafetensorError
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
