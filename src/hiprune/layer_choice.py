"""Which encoder layer looks at objects, judged from attention scores alone. Knows no model and no mask.

The paper tells an encoder's phases apart by how far from each other the tokens lie that receive most
attention ("average pairwise distance"): far in shallow layers, near in middle ones, far again in deep ones.
That is for pictures of one main object. Two more things are seen without a mask, for several objects too:

- objects are more than one token large, so tokens that look at objects come in clumps;
- objects are elsewhere in the next picture. A layer that looks at the same places in every picture looks at
  places, not at things.

The proposal is the layer with the highest `clumps * (1 - habit)`, both as defined below, among those before
the deep layer: what the deep layer looks at is kept as registers anyway.

Letters: L layers, N tokens of one view, H×W its grid, k = N / 10 the tokens that receive most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
import numpy.typing as npt

TOP_SHARE: Final = 0.1
"""The paper's share of tokens that count as looked at."""
LEAST_VIEWS: Final = 2
"""Of fewer, nothing can be said about habit."""
ENOUGH_VIEWS: Final = 8
"""From here on a proposal hardly changes with the pictures."""
_CELLS: Final = 12
"""Rows and columns of the common grid on which pictures of different shapes are compared."""
_PAIRS: Final = 2000

Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class View:
    """The scores of one view of a picture."""

    scores: Mapping[int, Scores]  # 1-based layer → (N,), row-major
    grid: tuple[int, int]
    """H, W."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What one layer's top tokens look like, as means over views."""

    layer: int
    distance: float
    """Mean distance of two top tokens over that of any two tokens of the grid: the paper's dispersion."""
    clumps: float
    """Share of the top tokens' neighbours (up to four each) that are top tokens too; 0.1 by chance."""
    habit: float
    """Overlap of where two pictures' top tokens lie, in cells of a 12×12 grid; 1: always the same places."""
    attention: float
    """Share of all attention that the top tokens receive; 0.1 if all receive alike."""

    @property
    def merit(self) -> float:
        """By which layers are compared."""
        return self.clumps * (1 - self.habit)


def top_tokens(scores: Scores) -> Mask:
    """The tenth of tokens that receive most, at least one, ties to the lower index. (N,) in and out."""
    top = np.zeros(scores.size, dtype=np.bool_)
    count = max(1, round(TOP_SHARE * scores.size))
    top[np.argsort(-scores, kind="stable")[:count]] = True
    return top


def profiles(views: Sequence[View]) -> list[Profile]:
    """One profile a layer, layers ascending. Raises ValueError for fewer than two views, or unlike ones."""
    if len(views) < LEAST_VIEWS:
        raise ValueError(f"{len(views)} views, expected at least {LEAST_VIEWS}")
    layers = sorted(views[0].scores)
    if any(sorted(view.scores) != layers for view in views):
        raise ValueError("views with scores of different layers")
    return [_profile(layer, views) for layer in layers]


def suggest(found: Sequence[Profile], deep_layer: int) -> int:
    """The layer of the highest merit before the deep one, if there is any; of equals the lower one."""
    able = [profile for profile in found if profile.layer < deep_layer] or list(found)
    return max(able, key=lambda profile: (profile.merit, -profile.layer)).layer


def _profile(layer: int, views: Sequence[View]) -> Profile:
    tops = [top_tokens(view.scores[layer]) for view in views]
    received = [
        float(view.scores[layer][top].sum() / view.scores[layer].sum())
        for view, top in zip(views, tops, strict=True)
    ]
    grids = [view.grid for view in views]
    return Profile(
        layer=layer,
        distance=float(np.mean([_distance(top, grid) for top, grid in zip(tops, grids, strict=True)])),
        clumps=float(np.mean([_clumps(top, grid) for top, grid in zip(tops, grids, strict=True)])),
        habit=_habit([_cells(top, grid) for top, grid in zip(tops, grids, strict=True)]),
        attention=float(np.mean(received)),
    )


def _distance(top: Mask, grid: tuple[int, int]) -> float:
    """Mean distance of two of the top tokens, over that of any two tokens of the grid."""
    every = _mean_distance(np.arange(top.size), grid[1])
    return _mean_distance(np.flatnonzero(top), grid[1]) / every if every else 1.0


def _mean_distance(indices: npt.NDArray[np.intp], width: int) -> float:
    """Mean Euclidean distance of two different tokens, from how often each offset occurs: no N² of them."""
    if indices.size < 2:
        return 0.0
    rows, columns = np.divmod(indices, width)
    rows, columns = rows - rows.min(), columns - columns.min()
    shape = (2 * int(rows.max()) + 1, 2 * int(columns.max()) + 1)
    plane = np.zeros((int(rows.max()) + 1, int(columns.max()) + 1))
    plane[rows, columns] = 1
    # the autocorrelation counts pairs by offset; the zero offset has distance 0
    spectrum = np.fft.rfft2(plane, shape)
    pairs = np.fft.fftshift(np.fft.irfft2(spectrum * np.conj(spectrum), shape))
    down, across = (np.arange(extent) - extent // 2 for extent in shape)
    total = float((pairs * np.hypot(down[:, None], across)).sum())
    return total / (indices.size * (indices.size - 1))


def _clumps(top: Mask, grid: tuple[int, int]) -> float:
    """Share of top tokens' neighbours inside the grid that are top tokens."""
    plane = top.reshape(grid)
    both = 2 * int((plane[1:] & plane[:-1]).sum() + (plane[:, 1:] & plane[:, :-1]).sum())
    around = np.zeros(grid, dtype=np.int64)
    around[1:] += 1
    around[:-1] += 1
    around[:, 1:] += 1
    around[:, :-1] += 1
    neighbours = int(around[plane].sum())
    return both / neighbours if neighbours else 0.0


def _cells(top: Mask, grid: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Share of the top tokens in each cell of the common grid, (_CELLS²,)."""
    rows, columns = np.divmod(np.flatnonzero(top), grid[1])
    cells = (rows * _CELLS // grid[0]) * _CELLS + columns * _CELLS // grid[1]
    return np.bincount(cells, minlength=_CELLS * _CELLS) / max(1, rows.size)


def _habit(shares: Sequence[npt.NDArray[np.float64]]) -> float:
    """Mean overlap of two pictures' cells, of all pairs or of as many as `_PAIRS`, spread evenly."""
    pairs = list(combinations(range(len(shares)), 2))
    chosen = pairs[:: max(1, len(pairs) // _PAIRS)]
    return float(np.mean([np.minimum(shares[one], shares[other]).sum() for one, other in chosen]))
