"""LLaVA-1.5's tower: CLIP, one view an image, nothing run behind the feature layer, CLS dropped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hiprune.checkpoints import Checkpoint, image_processor_settings
from hiprune.errors import Unsupported
from hiprune.loading import load_part
from services.encoder.aligned import AlignedProjection
from services.encoder.attention import ScoreCapture
from services.encoder.families import EncodedView, Prepared


class ClipTower:
    """A CLIP vision tower that ends at the feature layer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        projection: AlignedProjection | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        facts = checkpoint.facts
        config = CLIPVisionConfig(**checkpoint.config["vision_config"])
        # with the layers behind it never loaded, the last hidden state is the feature
        config.num_hidden_layers = facts.deep_layer
        config._attn_implementation = "sdpa"
        self.dtype = dtype
        self._device = device
        self._grid = facts.grid or (0, 0)
        self.model = load_part(
            CLIPVisionModel,
            checkpoint.path,
            part="vision tower",
            config=config,
            key_mapping={facts.vision_keys.pattern: ""},
            dtype=dtype,
        ).to(device)
        self._projection = projection
        body = getattr(self.model, "vision_model", self.model)  # the name went away within transformers 5
        self._capture = ScoreCapture(
            {number: layer.self_attn for number, layer in enumerate(body.encoder.layers, start=1)}
        )
        settings = image_processor_settings(checkpoint.path)
        settings.pop("image_processor_type", None)
        # PIL's resize and not torchvision's: they differ in the last bit, and tokens must not
        self._processor = CLIPImageProcessorPil(**settings)

    def prepare(self, image: Image.Image) -> Prepared:
        """One view, (1, 3, h, w)."""
        pixels = self._processor(image, return_tensors="pt")["pixel_values"]
        height, width = self._grid
        return Prepared(pixels, height * width)

    def prepare_video(self, frames: Sequence[Image.Image], frames_per_second: float) -> Prepared:
        """Never called: the family takes no video."""
        raise Unsupported("the llava family takes images, not video")

    @torch.inference_mode()
    def encode(
        self, items: Sequence[Prepared], layers: Collection[int], aligned: Sequence[bool]
    ) -> list[list[EncodedView]]:
        """One view an item; B items in one forward."""
        pixels = torch.cat([item.pixels for item in items]).to(self._device, self.dtype)  # (B, 3, h, w)
        with self._capture.recording(layers) as scores:
            hidden = self.model(pixel_values=pixels).last_hidden_state  # (B, 1 + N, D), CLS first
        features = hidden[:, 1:]  # (B, N, D)
        columns = {layer: found[:, 1:].cpu() for layer, found in scores.items()}  # (B, N) each
        on_host = features.cpu()
        views = []
        for number, wanted in enumerate(aligned):
            projected = None
            if wanted and self._projection is not None:
                projected = self._projection(features[number]).cpu()
            view = EncodedView(
                features=on_host[number],
                scores={layer: found[number] for layer, found in columns.items()},
                grid=self._grid,
                aligned=projected,
            )
            views.append([view])
        return views


def load(checkpoint: Checkpoint, paired: Path | None, device: torch.device, dtype: torch.dtype) -> ClipTower:
    """The tower, and the paired projection where there is one. Raises CheckpointError."""
    projection = AlignedProjection(paired, device, checkpoint.facts.hidden_size) if paired else None
    return ClipTower(checkpoint, projection, device, dtype)
