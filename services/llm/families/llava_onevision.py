"""LLaVA-OneVision, language side: its projector, and the packing of base view and tiles."""

from __future__ import annotations

import re
from typing import Any

from hiprune.checkpoints import Checkpoint, CheckpointError
from hiprune.loading import read_tensors
from services.llm.anyres import AnyresAdapter
from services.llm.families.llava import language_part, load_projector
from services.llm.placement import Placement


def load(checkpoint: Checkpoint, config: Any, placement: Placement) -> AnyresAdapter:
    """The adapter with its weights. `config` is a LlavaOnevisionConfig. Raises CheckpointError."""
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

    largest = re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)
    if largest is None:
        raise CheckpointError(
            f"{checkpoint.path}: config.json: vision_aspect_ratio is {config.vision_aspect_ratio!r}, "
            "expected anyres_max_ and a number of tiles"
        )
    projector = load_projector(lambda: LlavaOnevisionMultiModalProjector(config), checkpoint, placement)
    newline = {"image_newline": ("image_newline", "model.image_newline")}
    return AnyresAdapter(
        projector,
        read_tensors(checkpoint.path, newline, part="newline embedding")["image_newline"],
        language_part(config),
        int(config.image_token_id),
        placement,
        pinpoints=config.image_grid_pinpoints,
        tile=int(config.vision_config.image_size),
        max_tiles=int(largest[1]),
    )
