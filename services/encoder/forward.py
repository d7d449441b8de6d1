"""One forward of a tower whose views have one size: pixels go up, hidden states and scores come back.

Shared by the families on CLIP and SigLIP. On a GPU the forwards of small batches are also kept as CUDA
graphs, where that measures faster. Knows no family: what the rows of a view mean is for the adapter to tell.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from services.encoder import graphs, transfers
from services.encoder.attention import ScoreCapture

log = logging.getLogger("hiprune.encoder")

GRAPHED_BATCHES: Final = (1, 2, 3, 4, 5)
"""Views in a forward that is worth a graph: an image, or an image with its tiles, alone. Larger batches keep
the GPU busier than their launches keep the host."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a forward leaves, on the tower's device. B views of P + N rows."""

    states: Tensor  # (B, P + N, D) in the tower's dtype; the P rows outside the grid first
    scores: Mapping[int, Tensor]  # 1-based layer → (B, N) float32


class ViewForward:
    """A tower over views of one size, up to its feature layer, with its scores on request."""

    def __init__(self, model: Any, *, leading: int) -> None:
        """`model` returns `last_hidden_state` for `pixel_values`; `leading` rows P come before the grid."""
        parameter = next(model.parameters())
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        self._model: nn.Module = model
        self._leading = leading
        body = getattr(model, "vision_model", model)  # the name went away within transformers 5
        self._capture = ScoreCapture(
            {number: layer.self_attn for number, layer in enumerate(body.encoder.layers, start=1)}
        )
        self._graphs: dict[tuple[torch.Size, frozenset[int]], graphs.GraphedForward] = {}

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[Tensor], layers: Collection[int]) -> Hidden:
        """Hidden states of all views in one forward; a later call may overwrite them.

        pixels  # (bᵢ, 3, h, w) float32 each, B = Σ bᵢ
        """
        views = transfers.to_device(pixels, self.device, self.dtype)  # (B, 3, h, w)
        wanted = frozenset(layers)
        graph = self._graphs.get((views.shape, wanted))
        states, *columns = graph(views) if graph else self._run(views, wanted)
        # a CLS counts among the queries; its own column is dropped
        found = zip(sorted(wanted), columns, strict=True)
        return Hidden(states, {layer: column[:, self._leading :] for layer, column in found})

    @torch.inference_mode()
    def warm_up(self, shape: Sequence[int], layers: Collection[int]) -> None:
        """Runs views of `shape` (3, h, w) once, so that nobody's request waits for kernels and memory."""
        wanted = frozenset(layers)
        if self.device.type != "cuda":
            self([torch.zeros(1, *shape)], wanted)
            return
        for batch in GRAPHED_BATCHES:
            views = torch.zeros(batch, *shape, device=self.device, dtype=self.dtype)
            graph = graphs.if_faster(lambda pixels: self._run(pixels, wanted), views)
            if graph is not None:
                self._graphs[views.shape, wanted] = graph

    def _run(self, views: Tensor, layers: frozenset[int]) -> tuple[Tensor, ...]:
        """Hidden states (B, P + N, D), then each layer's scores (B, P + N), layers ascending."""
        with self._capture.recording(layers) as scores:
            states: Tensor = self._model(pixel_values=views).last_hidden_state
        return states, *(scores[layer] for layer in sorted(layers))
