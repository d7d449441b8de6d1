"""Video-LLaVA's towers: two CLIPs, one for images and one for frames, neither run behind the feature layer.

An image is one view without its CLS; a video is a view for each of 8 frames, whose CLS stays beside the grid.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, VideoLlavaConfig
from transformers.image_utils import ChannelDimension
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor
from transformers.models.video_llava.modeling_video_llava import VideoLlavaMultiModalProjector

from hiprune.checkpoints import Checkpoint, image_processor_settings
from hiprune.families.video_llava import sampled_frames
from hiprune.loading import load_module, load_part
from hiprune.v1 import encoder_service_pb2
from services.encoder import transfers
from services.encoder.families import BLANK, EncodedView, Prepared
from services.encoder.forward import Hidden, ViewForward

_PROJECTOR_PREFIXES: Final = ("multi_modal_projector.", "model.multi_modal_projector.")


def load_frames_tower(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype
) -> CLIPVisionModel:
    """One of the two CLIP towers, up to the feature layer. Raises CheckpointError."""
    config = CLIPVisionConfig(**checkpoint.config["vision_config"])
    # with the layers behind it never loaded, the last hidden state is the feature
    config.num_hidden_layers = checkpoint.facts.deep_layer
    config._attn_implementation = "sdpa"
    return load_part(
        CLIPVisionModel,
        checkpoint.path,
        part=name.replace("_", " "),
        config=config,
        key_mapping={rf"^(?:model\.)?{name}\.(?:vision_model\.)?": ""},
        dtype=dtype,
    ).to(device)


class VideoLlavaTowers:
    """Both towers, the pixels for them, and the projector into the language model's space."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._grid = checkpoint.facts.grid or (0, 0)
        self.image_tower = load_frames_tower(checkpoint, "image_tower", device, dtype)
        self.video_tower = load_frames_tower(checkpoint, "video_tower", device, dtype)
        self._forwards = tuple(ViewForward(each, leading=1) for each in (self.image_tower, self.video_tower))
        config = VideoLlavaConfig.from_pretrained(checkpoint.path, local_files_only=True)
        self._projector = load_module(
            lambda: VideoLlavaMultiModalProjector(config),
            checkpoint.path,
            _PROJECTOR_PREFIXES,
            part="projector",
            device=device,
            dtype=torch.float32,
        )
        settings = image_processor_settings(checkpoint.path)
        settings.pop("image_processor_type", None)
        self._processor = VideoLlavaImageProcessor(**settings)

    def patches(self, size: tuple[int, int], frames: int | None = None) -> int:
        """An image's one view, or the sampled frames' with their CLS, whatever the size."""
        height, width = self._grid
        return height * width if frames is None else len(sampled_frames(frames)) * (height * width + 1)

    def prepare(self, image: Image.Image) -> Prepared:
        """One view, (1, 3, h, w)."""
        return Prepared(self._pinned(self._pixels([image])), self.patches(image.size))

    def prepare_video(self, frames: Sequence[Image.Image], frames_per_second: float) -> Prepared:
        """8 views, (8, 3, h, w); the layout says of which frames. The model knows no rate."""
        chosen = sampled_frames(len(frames))
        distinct = sorted(set(chosen))
        pixels = self._pixels([frames[number] for number in distinct])
        pixels = pixels[[distinct.index(number) for number in chosen]]
        layout = encoder_service_pb2.MediaLayout(video=True, sampled_frames=chosen)
        cost = self.patches(frames[0].size, len(frames))
        return Prepared(self._pinned(pixels), cost, layout)

    def _pinned(self, pixels: torch.Tensor) -> torch.Tensor:
        return transfers.pin(pixels, self.device)

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """(F, 3, h, w) float32 of F images.

        For an image this is the stock processor, bit for bit. For frames stock has a second one, written for
        torchvision: same sizes, crop, mean and deviation, but its bicubic kernel is torchvision's and not
        PIL's, so that single pixels differ by a rounding. Ours are the image's, with no torchvision at all.
        """
        # stock guesses where the channels are, and takes the rows of a picture 3 pixels high for them
        batch = self._processor(images, input_data_format=ChannelDimension.LAST, return_tensors="pt")
        pixels: torch.Tensor = batch["pixel_values_images"]
        return pixels

    @torch.inference_mode()
    def encode(
        self, items: Sequence[Prepared], layers: Collection[int], aligned: Sequence[bool]
    ) -> list[list[EncodedView]]:
        """One view an image, 8 a video; one forward for all images and one for all frames."""
        encoded: list[list[EncodedView]] = [[] for _ in items]
        for is_video, forward in enumerate(self._forwards):
            places = [place for place, item in enumerate(items) if item.layout.video == is_video]
            if not places:
                continue
            hidden = forward([items[place].pixels for place in places], layers)  # (ΣV, 1 + N, D)
            start = 0
            for place in places:
                part = slice(start, start + len(items[place].pixels))
                encoded[place] = self._views(hidden.part(part), bool(is_video), aligned[place])
                start = part.stop
        return encoded

    def _views(self, hidden: Hidden, is_video: bool, aligned: bool) -> list[EncodedView]:
        """The views of one media item, of its (V, 1 + N, D) features and (V, N) scores."""
        with transfers.download() as fetch:
            on_host = fetch(hidden.states)
            columns = {layer: fetch(column) for layer, column in hidden.scores.items()}
            from_cls = {layer: fetch(column) for layer, column in hidden.cls_scores.items()}
            projected = fetch(self._aligned(hidden.states[:, 1:])) if aligned else None  # (V, N, H)
        return [
            EncodedView(
                features=tokens[1:],
                scores={layer: found[number] for layer, found in columns.items()},
                grid=self._grid,
                aligned=None if projected is None else projected[number],
                prefix=tokens[:1] if is_video else None,
                frame=number,
                cls_scores={layer: found[number] for layer, found in from_cls.items()},
            )
            for number, tokens in enumerate(on_host)
        ]

    def warm_up(self, layers: Collection[int]) -> None:
        """See `Tower`."""
        for forward in self._forwards:
            forward.warm_up(self._pixels([BLANK]).shape[1:], layers)

    def _aligned(self, features: torch.Tensor) -> torch.Tensor:
        """(…, D) to (…, H) float16, each row of length 1: where the language model would see the token."""
        projected: torch.Tensor = self._projector(features.float())
        return functional.normalize(projected, dim=-1).half()


def load(
    checkpoint: Checkpoint, paired: Path | None, device: torch.device, dtype: torch.dtype
) -> VideoLlavaTowers:
    """The towers and the projector. `paired` is None: no text encoder is paired. Raises CheckpointError."""
    return VideoLlavaTowers(checkpoint, device, dtype)
