"""LLaVA-NeXT's tower: CLIP up to the feature layer, CLS dropped, over a base view and its tiles."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaNextConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from hiprune.checkpoints import Checkpoint, image_processor_settings
from hiprune.loading import load_part
from services.encoder.aligned import AlignedProjection
from services.encoder.anyres import AnyresTower


def load(
    checkpoint: Checkpoint, paired: Path | None, device: torch.device, dtype: torch.dtype
) -> AnyresTower:
    """The tower, and the paired projection where there is one. Raises CheckpointError."""
    facts = checkpoint.facts
    config = CLIPVisionConfig(**checkpoint.config["vision_config"])
    # with the layers behind it never loaded, the last hidden state is the feature
    config.num_hidden_layers = facts.deep_layer
    config._attn_implementation = "sdpa"
    model = load_part(
        CLIPVisionModel,
        checkpoint.path,
        part="vision tower",
        config=config,
        key_mapping={facts.vision_keys.pattern: ""},
        dtype=dtype,
    ).to(device)
    settings = image_processor_settings(checkpoint.path)
    settings.pop("image_processor_type", None)
    return AnyresTower(
        checkpoint,
        model,
        LlavaNextImageProcessorPil(**settings),
        AlignedProjection(paired, device, facts.hidden_size) if paired else None,
        LlavaNextConfig.from_dict(dict(checkpoint.config)).image_grid_pinpoints,
        leading=1,
    )
