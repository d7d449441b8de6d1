"""Qwen2.5-VL's tower: patches of several media packed into one sequence, features behind the 2×2 merger.

An image is one view of (h/28)×(w/28) merged tokens; a video one view for each temporal slice of two frames,
as attention never leaves a slice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_window_index

from hiprune.checkpoints import Checkpoint, image_processor_settings, read_json
from hiprune.errors import InvalidInput
from hiprune.loading import load_part
from hiprune.v1 import encoder_service_pb2
from services.encoder import transfers
from services.encoder.attention import PACKED, ScoreCapture
from services.encoder.families import BLANK, EncodedView, Prepared

_IMAGE: Final = "media.image"
_FRAMES: Final = "media.video.frames[0]"  # all are of one size
_SMALL_SIDE: Final = 64
_LARGE_SIDE: Final = 1344
"""Pixels a side of the images to warm up on."""


class LinearPatches(nn.Module):
    """The tower's first layer as one matrix product.

    Stock has it as a convolution in three dimensions whose steps are as wide as its kernel: decision 29 says
    what cuDNN makes of that.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: the convolution's (D, C, T, p, p)."""
        super().__init__()
        self.weight = nn.Parameter(weight.flatten(1), requires_grad=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(n, C·T·p·p) to (n, D)."""
        return functional.linear(patches.to(self.weight.dtype), self.weight)


class QwenTower:
    """The vision tower with its merger."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        facts = checkpoint.facts
        config = Qwen2_5_VLVisionConfig(**checkpoint.config["vision_config"])
        config._attn_implementation = "sdpa"
        self.device, self.dtype = device, dtype
        self._merge = int(config.spatial_merge_size)
        self.model = load_part(
            Qwen2_5_VisionTransformerPretrainedModel,
            checkpoint.path,
            part="vision tower",
            config=config,
            key_mapping={facts.vision_keys.pattern: ""},
            dtype=dtype,
        ).to(device)
        if device.type == "cuda":
            self.model.patch_embed = LinearPatches(self.model.patch_embed.proj.weight)
        # without it, every layer would ask the device for its longest segment, and wait
        self.model.config._attn_implementation_internal = PACKED
        # Blocks of windows too: a token then scores what it receives from its own window, as no attention
        # reaches it from beyond.
        self._capture = ScoreCapture(
            {number: block.attn for number, block in enumerate(self.model.blocks, start=1)}, packed=True
        )
        # PIL's resize and not torchvision's, as in every family
        self._image_processor = _processor(image_processor_settings(checkpoint.path))
        self._video_processor = _processor(_video_settings(checkpoint.path))

    def patches(self, size: tuple[int, int], frames: int | None = None) -> int:
        """Of the sides to which the processor would resize, in every slice. Raises InvalidInput."""
        width, height = size
        if frames is None:
            return self._count(self._image_processor, height, width, _IMAGE)
        slices = -(-frames // int(self._video_processor.temporal_patch_size))
        return slices * self._count(self._video_processor, height, width, _FRAMES)

    def prepare(self, image: Image.Image) -> Prepared:
        """One view; pixels (1, H, W, m², P): for each merged token its m×m patches of P values."""
        patches, (height, width) = self._patches(self._image_processor, image, _IMAGE)
        return self._prepared(patches, height, width)  # a still image repeats within its patch of time

    def prepare_video(self, frames: Sequence[Image.Image], frames_per_second: float) -> Prepared:
        """T views of two frames each; pixels (T, H, W, m², P).

        As stock's video processor: the same sizes, an odd last frame repeated, the same order of values.
        Unlike it, each frame is resized and normalised exactly as an image is: stock resizes video by
        torchvision's bicubic kernel, whose pixels differ from PIL's by a level or so of 255.
        """
        processor = self._video_processor
        span, side = processor.temporal_patch_size, processor.patch_size
        slices = torch.empty(0)
        # one at a time: as images, all frames together would take `span` times the memory
        for number, frame in enumerate(frames):
            patches, (height, width) = self._patches(processor, frame, _FRAMES)  # (n, P)
            # the frame came as a still image, repeated in time: its first copy is the frame
            still = patches.view(height * width, -1, span, side, side)[:, :, 0]  # (n, C, p, p)
            if number == 0:
                count = -(-len(frames) // span)
                slices = torch.empty(count, *still.shape[:2], span, side, side)  # (T, n, C, span, p, p)
            slices[number // span, :, :, number % span] = still
        slices[-1, :, :, number % span + 1 :] = still.unsqueeze(2)  # where the last slice lacks a frame
        layout = encoder_service_pb2.MediaLayout(
            video=True, sampled_frames=range(len(frames)), seconds_per_slice=span / frames_per_second
        )
        return self._prepared(slices.flatten(0, 1).flatten(1), height, width, layout)

    @torch.inference_mode()
    def encode(
        self, items: Sequence[Prepared], layers: Collection[int], aligned: Sequence[bool]
    ) -> list[list[EncodedView]]:
        """Media of any sizes in one forward. There is no paired text encoder, so nothing is ever aligned."""
        merge = self._merge
        grids = [tuple(item.pixels.shape[:3]) for item in items]  # T, H, W in merged tokens
        patches = [item.pixels.flatten(0, 3) for item in items]  # (nᵢ, P) each
        grid_thw = torch.tensor([(slices, height * merge, width * merge) for slices, height, width in grids])
        # Inside the tower, tokens stand window by window, so scores of windows and of whole slices alike come
        # in that order, four patches of a merged token side by side. Worked out before the forward and on the
        # host: asking a device for its grid behind a forward would wait for the forward.
        window_index, _ = get_vision_window_index(
            grid_thw, merge, window_size=self.model.window_size, patch_size=self.model.patch_size
        )
        row_major = torch.argsort(window_index).to(self.device)  # (N,)
        with self._capture.recording(layers) as scores:
            output = self.model(
                transfers.to_device(patches, self.device, self.dtype), grid_thw=grid_thw.to(self.device)
            )
        with transfers.download() as fetch:
            features = fetch(output.pooler_output)  # (N, D), row-major: the tower has undone its permutation
            merged = {
                layer: fetch(column[0].view(-1, merge * merge).mean(dim=-1)[row_major])  # (N,)
                for layer, column in scores.items()
            }
        result = []
        start = 0
        for slices, height, width in grids:
            views = []
            for frame in range(slices):
                part = slice(start, start := start + height * width)
                views.append(
                    EncodedView(
                        features=features[part],
                        scores={layer: found[part] for layer, found in merged.items()},
                        grid=(height, width),
                        frame=frame,
                    )
                )
            result.append(views)
        return result

    def warm_up(self, layers: Collection[int]) -> None:
        """See `Tower`. Once with a small image, and on a GPU with a large one, which takes other kernels."""
        sides = (_SMALL_SIDE, _LARGE_SIDE) if self.device.type == "cuda" else (_SMALL_SIDE,)
        for side in sides:
            self.encode([self.prepare(BLANK.resize((side, side)))], layers, [False])

    def _count(self, processor: Any, height: int, width: int, field: str) -> int:
        """Patches of an image of so many pixels, once it is resized. Raises InvalidInput."""
        with _resizable(field):
            return int(processor.get_number_of_image_patches(height, width))

    def _patches(
        self, processor: Any, image: Image.Image, field: str
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """An image's patches (n, P) in merge order, and how many down and across. Raises InvalidInput."""
        with _resizable(field):
            prepared = processor(images=[image], return_tensors="pt")
        _, height, width = prepared["image_grid_thw"][0].tolist()
        return prepared["pixel_values"], (height, width)

    def _prepared(
        self,
        patches: torch.Tensor,  # (T·h·w, P)
        height: int,
        width: int,
        layout: encoder_service_pb2.MediaLayout | None = None,
    ) -> Prepared:
        """Patches in a shape that says their grid. `height` and `width` count patches."""
        merge = self._merge
        pixels = patches.view(-1, height // merge, width // merge, merge * merge, patches.shape[1])
        return Prepared(
            transfers.pin(pixels, self.device), len(patches), layout or encoder_service_pb2.MediaLayout()
        )


def load(checkpoint: Checkpoint, paired: Path | None, device: torch.device, dtype: torch.dtype) -> QwenTower:
    """The tower. Raises CheckpointError."""
    return QwenTower(checkpoint, device, dtype)


@contextmanager
def _resizable(field: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # an image too long for its width
        raise InvalidInput(f"cannot be resized: {error}", field=field) from error


def _processor(settings: dict[str, Any]) -> Any:
    # the name of the class that wrote them is another's, and would stay with the object
    return Qwen2VLImageProcessorPil(
        **{
            key: value
            for key, value in settings.items()
            if key not in {"image_processor_type", "processor_class"}
        }
    )


def _video_settings(path: Path) -> dict[str, Any]:
    """The video processor's settings from where transformers looks: its own, else the image processor's."""
    processor, own = path / "processor_config.json", path / "video_preprocessor_config.json"
    if processor.is_file():
        nested = read_json(processor).get("video_processor")
        if isinstance(nested, dict):
            return nested
    return read_json(own) if own.is_file() else image_processor_settings(path)
