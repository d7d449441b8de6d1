"""A tower over images of any resolution: the base view, then its tiles in raster order, one forward for all.

Shared by the families that tile. Knows no class of transformers: an adapter brings tower and processor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hiprune.anyres import Pinpoints, Tiling, tiling
from hiprune.checkpoints import Checkpoint, CheckpointError
from hiprune.errors import Unsupported
from hiprune.v1 import encoder_service_pb2
from services.encoder import transfers
from services.encoder.families import EncodedView, Prepared
from services.encoder.forward import ViewForward

Projection = Callable[[torch.Tensor], torch.Tensor]
"""(N, D) features to (N, A) float16 in the space in which questions are compared."""


class AnyresTower:
    """A vision tower that sees an image as V = 1 + rows · columns square views of one size."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: torch.nn.Module,
        processor: Any,
        projection: Projection | None,
        pinpoints: Pinpoints,
        *,
        leading: int,
    ) -> None:
        """`leading` counts the tokens before the grid, such as a CLS, that are dropped.

        `pinpoints` are the model's; the processor's own must equal them. Raises CheckpointError.
        """
        self.model = model
        self._forward = ViewForward(model, leading=leading)
        self.device, self.dtype = self._forward.device, self._forward.dtype
        self._family = checkpoint.facts.family
        self._grid = checkpoint.facts.grid or (0, 0)
        self._tile = int(checkpoint.config["vision_config"]["image_size"])
        self._pinpoints = check_pinpoints(pinpoints, self._tile, checkpoint.path)
        if [list(each) for each in processor.image_grid_pinpoints] != [list(each) for each in pinpoints]:
            raise CheckpointError(
                f"{checkpoint.path}: image_grid_pinpoints of the image processor and of config.json differ"
            )
        self._processor = processor
        self._projection = projection
        self._leading = leading

    def patches(self, size: tuple[int, int], frames: int | None = None) -> int:
        """The base view's and its tiles'."""
        tiles = self._tiling(*size)
        return (1 + tiles.rows * tiles.columns) * self._grid[0] * self._grid[1]

    def prepare(self, image: Image.Image) -> Prepared:
        """V views of one size, (V, 3, h, w)."""
        pixels = self._processor(image, return_tensors="pt")["pixel_values"][0]
        tiles = self._tiling(*image.size)
        layout = encoder_service_pb2.MediaLayout(
            original_height=image.height,
            original_width=image.width,
            tile_rows=tiles.rows,
            tile_columns=tiles.columns,
        )
        return Prepared(transfers.pin(pixels, self.device), self.patches(image.size), layout)

    def prepare_video(self, frames: Sequence[Image.Image], frames_per_second: float) -> Prepared:
        """Never called: the family takes no video."""
        raise Unsupported(f"the {self._family} family takes images, not video")

    @torch.inference_mode()
    def encode(
        self, items: Sequence[Prepared], layers: Collection[int], aligned: Sequence[bool]
    ) -> list[list[EncodedView]]:
        """The views of each item: base, then tiles. All views of all items go through in one forward."""
        hidden = self._forward([item.pixels for item in items], layers)  # (ΣV, P + N, D)
        features = hidden.states[:, self._leading :]  # (ΣV, N, D)
        ends = list(itertools.accumulate(len(item.pixels) for item in items))
        views_of = [range(end - len(item.pixels), end) for item, end in zip(items, ends, strict=True)]
        with transfers.download() as fetch:
            on_host = fetch(features)
            columns = {layer: fetch(column) for layer, column in hidden.scores.items()}  # (ΣV, N) each
            from_cls = {layer: fetch(column) for layer, column in hidden.cls_scores.items()}  # the same
            projected = [
                fetch(self._projection(features[views.start : views.stop].flatten(0, 1)))  # (V · N, A)
                if wanted and self._projection is not None
                else None
                for views, wanted in zip(views_of, aligned, strict=True)
            ]
        encoded = []
        for item, views, rows in zip(items, views_of, projected, strict=True):
            likenesses = [None] * len(views) if rows is None else rows.view(len(views), -1, rows.shape[-1])
            tiles = self._tiling(item.layout.original_width, item.layout.original_height)
            encoded.append(
                [
                    EncodedView(
                        features=on_host[view],
                        scores={layer: found[view] for layer, found in columns.items()},
                        grid=self._grid,
                        aligned=likeness,
                        valid=valid,
                        cls_scores={layer: found[view] for layer, found in from_cls.items()},
                    )
                    for view, likeness, valid in zip(views, likenesses, (None, *tiles.valid), strict=True)
                ]
            )
        return encoded

    def _tiling(self, width: int, height: int) -> Tiling:
        return tiling(height, width, self._pinpoints, tile=self._tile, side=self._grid[0])

    def warm_up(self, layers: Collection[int]) -> None:
        """See `Tower`."""
        self._forward.warm_up((3, self._tile, self._tile), layers)


def check_pinpoints(pinpoints: Pinpoints, tile: int, path: Path) -> Pinpoints:
    """The pinpoints, all multiples of the tile's side in pixels. Raises CheckpointError."""
    for canvas in pinpoints:
        if len(canvas) != 2 or any(side < tile or side % tile for side in canvas):
            raise CheckpointError(
                f"{path}: config.json: image_grid_pinpoints has {list(canvas)}, expected a height and a "
                f"width that are multiples of the tower's {tile} pixels"
            )
    return pinpoints
