"""LLaVA-NeXT, language side: LLaVA-1.5's projector, and the packing of base view and tiles."""

from __future__ import annotations

from typing import Any

from hiprune.checkpoints import Checkpoint
from hiprune.loading import read_tensors
from services.llm.anyres import AnyresAdapter
from services.llm.families.llava import language_part, load_projector
from services.llm.placement import Placement


def load(checkpoint: Checkpoint, config: Any, placement: Placement) -> AnyresAdapter:
    """The adapter with its weights. `config` is the checkpoint's LlavaNextConfig. Raises CheckpointError."""
    from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

    projector = load_projector(lambda: LlavaNextMultiModalProjector(config), checkpoint, placement)
    newline = {"image_newline": ("image_newline", "model.image_newline")}
    return AnyresAdapter(
        projector,
        read_tensors(checkpoint.path, newline, part="newline embedding")["image_newline"],
        language_part(config),
        int(config.image_token_id),
        placement,
        pinpoints=config.image_grid_pinpoints,
        tile=int(config.vision_config.image_size),
    )
