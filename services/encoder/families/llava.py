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
from services.encoder import transfers
from services.encoder.aligned import AlignedProjection
from services.encoder.families import BLANK, EncodedView, Prepared
from services.encoder.forward import ViewForward


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
        self.device, self.dtype = device, dtype
        self._grid = facts.grid or (0, 0)
        self.model = load_part(
            CLIPVisionModel,
            checkpoint.path,
            part="vision tower",
            config=config,
            key_mapping={facts.vision_keys.pattern: ""},
            dtype=dtype,
        ).to(device)
        self._forward = ViewForward(self.model, leading=1)
        self._projection = projection
        settings = image_processor_settings(checkpoint.path)
        settings.pop("image_processor_type", None)
        # PIL's resize and not torchvision's: they differ in the last bit, and tokens must not
        self._processor = CLIPImageProcessorPil(**settings)

    def patches(self, size: tuple[int, int], frames: int | None = None) -> int:
        """One view's, whatever the size."""
        height, width = self._grid
        return height * width

    def prepare(self, image: Image.Image) -> Prepared:
        """One view, (1, 3, h, w)."""
        pixels = self._processor(image, return_tensors="pt")["pixel_values"]
        return Prepared(transfers.pin(pixels, self.device), self.patches(image.size))

    def prepare_video(self, frames: Sequence[Image.Image], frames_per_second: float) -> Prepared:
        """Never called: the family takes no video."""
        raise Unsupported("the llava family takes images, not video")

    @torch.inference_mode()
    def encode(
        self, items: Sequence[Prepared], layers: Collection[int], aligned: Sequence[bool]
    ) -> list[list[EncodedView]]:
        """One view an item; B items in one forward."""
        hidden = self._forward([item.pixels for item in items], layers)  # (B, 1 + N, D), CLS first
        features = hidden.states[:, 1:]  # (B, N, D)
        with transfers.download() as fetch:
            on_host = fetch(features)
            columns = {layer: fetch(column) for layer, column in hidden.scores.items()}  # (B, N) each
            from_cls = {layer: fetch(column) for layer, column in hidden.cls_scores.items()}  # (B, N) each
            projected = {
                number: fetch(self._projection(features[number]))  # (N, A)
                for number, wanted in enumerate(aligned)
                if wanted and self._projection is not None
            }
        return [
            [
                EncodedView(
                    features=on_host[number],
                    scores={layer: column[number] for layer, column in columns.items()},
                    grid=self._grid,
                    aligned=projected.get(number),
                    cls_scores={layer: column[number] for layer, column in from_cls.items()},
                )
            ]
            for number in range(len(items))
        ]

    def warm_up(self, layers: Collection[int]) -> None:
        """See `Tower`."""
        self._forward.warm_up(self.prepare(BLANK).pixels.shape[1:], layers)


def load(checkpoint: Checkpoint, paired: Path | None, device: torch.device, dtype: torch.dtype) -> ClipTower:
    """The tower, and the paired projection where there is one. Raises CheckpointError."""
    projection = AlignedProjection(paired, device, checkpoint.facts.hidden_size) if paired else None
    return ClipTower(checkpoint, projection, device, dtype)
