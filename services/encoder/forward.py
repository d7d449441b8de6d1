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
    cls_scores: Mapping[int, Tensor]  # the same layers, attention from CLS alone; none without one

    def part(self, views: slice) -> Hidden:
        """Of some of the views."""
        scores, from_cls = (
            {layer: column[views] for layer, column in found.items()}
            for found in (self.scores, self.cls_scores)
        )
        return Hidden(self.states[views], scores, from_cls)


class ViewForward:
    """A tower over views of one size, up to its feature layer, with its scores on request."""

    def __init__(self, model: Any, *, leading: int) -> None:
        """`model` returns `last_hidden_state` for `pixel_values`; `leading` rows P come before the grid.

        The first of them, where there are any, is the CLS.
        """
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
        tokens = [column[:, self._leading :] for column in columns]
        ordered = sorted(wanted)
        from_cls = tokens[len(ordered) :]
        return Hidden(
            states,
            dict(zip(ordered, tokens, strict=False)),  # what is left over is the CLS's
            dict(zip(ordered, from_cls, strict=True)) if from_cls else {},
        )

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
        """Hidden states (B, P + N, D), each layer's scores (B, P + N), and each layer's attention from CLS.

        Layers ascend; without a CLS there is none of the last.
        """
        from_cls: dict[int, Tensor] | None = {} if self._leading else None
        with self._capture.recording(layers, first_rows=from_cls) as scores:
            states: Tensor = self._model(pixel_values=views).last_hidden_state
        ordered = sorted(layers)
        return states, *(found[layer] for found in (scores, from_cls or {}) if found for layer in ordered)
