"""Pruned media off the wire: checked against the model that is loaded, as tensors. Knows no weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch

from hiprune import tensors
from hiprune.errors import InvalidInput, Mismatch
from hiprune.families import Facts
from hiprune.v1 import pruner_service_pb2

_DIGEST_CHARS: Final = 12


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """What is left of one image or video."""

    features: torch.Tensor
    """(K, D), before the projector, as they came; all views, one after the other."""
    tokens_before: int
    """Visual tokens before pruning."""
    field: str
    """Path of the features in the message that brought them."""


def read_pruned(
    media: pruner_service_pb2.PrunedMedia, facts: Facts, vision_digest: str, *, field: str, views: int = 1
) -> VisualTokens:
    """The kept tokens of one media item of a family with `views` views.

    Raises Mismatch for another tower's, InvalidInput naming a field below `field` for malformed ones.
    """
    if media.vision_digest != vision_digest:
        raise Mismatch(
            f"the features are of vision tower {media.vision_digest[:_DIGEST_CHARS] or '(none)'}, "
            f"this model's is {vision_digest[:_DIGEST_CHARS]}",
            field=f"{field}.vision_digest",
        )
    if len(media.views) != views:
        raise InvalidInput(f"has {len(media.views)} views, expected {views}", field=f"{field}.views")
    features = [_read_view(view, facts, f"{field}.views[{index}]") for index, view in enumerate(media.views)]
    before = sum(view.selection.grid_height * view.selection.grid_width for view in media.views)
    return VisualTokens(
        torch.cat(features) if views > 1 else features[0], before, f"{field}.views[0].features"
    )


def _read_view(view: pruner_service_pb2.PrunedView, facts: Facts, field: str) -> torch.Tensor:
    """Features of one view, (K, D)."""
    selection, where = view.selection, f"{field}.selection"
    grid = (selection.grid_height, selection.grid_width)
    if min(grid) < 1 or (facts.grid is not None and grid != facts.grid):
        want = "at least 1×1" if facts.grid is None else "{}×{}".format(*facts.grid)
        name = "grid_height" if facts.grid is None or grid[0] != facts.grid[0] else "grid_width"
        raise InvalidInput(f"the grid is {grid[0]}×{grid[1]}, expected {want}", field=f"{where}.{name}")
    kept = selection.kept_indices
    count = grid[0] * grid[1]
    if not kept:
        raise InvalidInput("is empty, expected at least 1 index", field=f"{where}.kept_indices")
    if kept[0] < 0 or kept[-1] >= count or any(left >= right for left, right in pairwise(kept)):
        raise InvalidInput(
            f"are not ascending indices of the grid's {count} tokens, each in [0, {count - 1}]",
            field=f"{where}.kept_indices",
        )
    if view.HasField("prefix_features"):
        raise InvalidInput(
            f"is set, but the {facts.family} family keeps no token outside the grid",
            field=f"{field}.prefix_features",
        )
    if not view.HasField("features"):
        raise InvalidInput(
            f"is missing, expected a tensor of shape ({len(kept)}, {facts.hidden_size})",
            reason="MISSING_FIELD",
            field=f"{field}.features",
        )
    return tensors.from_proto(
        view.features, field=f"{field}.features", shape=(len(kept), facts.hidden_size), finite=True
    )
