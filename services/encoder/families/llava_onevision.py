"""LLaVA-OneVision's tower: SigLIP up to the feature layer, without its final norm, over views and tiles."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaOnevisionConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

from hiprune.checkpoints import Checkpoint, image_processor_settings
from hiprune.loading import load_module, load_part
from services.encoder.anyres import AnyresTower


def load(
    checkpoint: Checkpoint, paired: Path | None, device: torch.device, dtype: torch.dtype
) -> AnyresTower:
    """The tower and the projector; `paired` is None. Raises CheckpointError."""
    facts = checkpoint.facts
    whole = LlavaOnevisionConfig.from_dict(dict(checkpoint.config))
    config = SiglipVisionConfig(**checkpoint.config["vision_config"] | {"vision_use_head": False})
    config.num_hidden_layers = facts.deep_layer
    config._attn_implementation = "sdpa"
    model = load_part(
        SiglipVisionModel,
        checkpoint.path,
        part="vision tower",
        config=config,
        key_mapping={facts.vision_keys.pattern: ""},
        dtype=dtype,
    ).to(device)
    # stock takes the last hidden state from before the final norm
    body = getattr(model, "vision_model", model)
    body.post_layernorm = torch.nn.Identity()
    projector = load_module(
        lambda: LlavaOnevisionMultiModalProjector(whole),
        checkpoint.path,
        ("multi_modal_projector.", "model.multi_modal_projector."),
        part="projector",
        device=device,
        dtype=dtype,
    )

    def aligned(features: torch.Tensor) -> torch.Tensor:
        """(N, D) to (N, H) float16, each row of length 1."""
        return torch.nn.functional.normalize(projector(features).float(), dim=-1).half()

    settings = image_processor_settings(checkpoint.path)
    settings.pop("image_processor_type", None)
    return AnyresTower(
        checkpoint,
        model,
        LlavaOnevisionImageProcessorPil(**settings),
        aligned,
        whole.image_grid_pinpoints,
        leading=0,
    )
