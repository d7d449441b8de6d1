"""Pruned media off the wire: checked against the model that is loaded, as tensors. Knows no weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch

from hiprune import tensors
from hiprune.errors import InvalidInput, Mismatch, Unsupported
from hiprune.families import Facts
from hiprune.v1 import encoder_service_pb2, pruner_service_pb2

_DIGEST_CHARS: Final = 12
_MAX_VIEWS: Final = 256


@dataclass(frozen=True, slots=True)
class VisualView:
    """What is left of one view."""

    features: torch.Tensor
    """(K, D), before the projector, as they came."""
    kept: torch.Tensor
    """(K,) int64, row-major indices in the grid, ascending."""
    grid: tuple[int, int]
    """H, W."""
    prefix: torch.Tensor | None = None
    """(P, D): tokens outside the grid, such as a kept CLS."""
    valid: tuple[int, int, int, int] | None = None
    """Top, left, height, width of the part that is not padding; None: all of it."""

    @property
    def tokens_before(self) -> int:
        """Tokens before pruning, padding left out."""
        inside = self.grid[0] * self.grid[1] if self.valid is None else self.valid[2] * self.valid[3]
        return inside + (0 if self.prefix is None else len(self.prefix))

    @property
    def tokens_kept(self) -> int:
        """Tokens that are left, those outside the grid counted."""
        return len(self.kept) + (0 if self.prefix is None else len(self.prefix))

    @property
    def whole(self) -> bool:
        """Whether nothing was pruned."""
        return self.tokens_kept == self.tokens_before


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """What is left of one image or video."""

    views: tuple[VisualView, ...]
    layout: encoder_service_pb2.MediaLayout
    field: str
    """Path of the media item in the message that brought it."""

    @property
    def tokens_before(self) -> int:
        """Tokens before pruning, padding left out."""
        return sum(view.tokens_before for view in self.views)

    @property
    def tokens_kept(self) -> int:
        """Tokens that are left, those outside the grid counted."""
        return sum(view.tokens_kept for view in self.views)

    @property
    def whole(self) -> bool:
        """Whether nothing was pruned."""
        return all(view.whole for view in self.views)


def read_pruned(
    media: pruner_service_pb2.PrunedMedia, facts: Facts, vision_digest: str, *, field: str
) -> VisualTokens:
    """The kept tokens of one media item.

    Raises Mismatch for another tower's, InvalidInput naming a field below `field` for malformed ones.
    """
    if media.vision_digest != vision_digest:
        raise Mismatch(
            f"the features are of vision tower {media.vision_digest[:_DIGEST_CHARS] or '(none)'}, "
            f"this model's is {vision_digest[:_DIGEST_CHARS]}",
            field=f"{field}.vision_digest",
        )
    if not media.views:
        raise InvalidInput("is empty, expected at least 1 view", field=f"{field}.views")
    if len(media.views) > _MAX_VIEWS:
        raise InvalidInput(
            f"has {len(media.views)} views, expected at most {_MAX_VIEWS}",
            reason="LIMIT_EXCEEDED",
            field=f"{field}.views",
        )
    if media.layout.video and not facts.takes_video:
        raise Unsupported(f"the {facts.family} family takes images only", field=f"{field}.layout.video")
    views = tuple(
        _read_view(view, facts, f"{field}.views[{index}]") for index, view in enumerate(media.views)
    )
    return VisualTokens(views, media.layout, field)


def _read_view(view: pruner_service_pb2.PrunedView, facts: Facts, field: str) -> VisualView:
    """One view, checked against its own grid and the tower's width."""
    selection, where = view.selection, f"{field}.selection"
    grid = (selection.grid_height, selection.grid_width)
    if min(grid) < 1 or (facts.grid is not None and grid != facts.grid):
        want = "at least 1×1" if facts.grid is None else "{}×{}".format(*facts.grid)
        name = "grid_height" if facts.grid is None or grid[0] != facts.grid[0] else "grid_width"
        raise InvalidInput(f"the grid is {grid[0]}×{grid[1]}, expected {want}", field=f"{where}.{name}")
    kept = selection.kept_indices
    count = grid[0] * grid[1]
    if kept and (kept[0] < 0 or kept[-1] >= count or any(left >= right for left, right in pairwise(kept))):
        raise InvalidInput(
            f"are not ascending indices of the grid's {count} tokens, each in [0, {count - 1}]",
            field=f"{where}.kept_indices",
        )
    valid = None
    if selection.HasField("valid"):
        region = selection.valid
        valid = (region.top, region.left, region.height, region.width)
        if min(valid) < 0 or region.top + region.height > grid[0] or region.left + region.width > grid[1]:
            raise InvalidInput(f"{valid} is outside the grid of {grid[0]}×{grid[1]}", field=f"{where}.valid")
    # a view of padding alone keeps nothing; any other keeps something
    if not kept and (valid is None or valid[2] * valid[3] > 0):
        raise InvalidInput("is empty, expected at least 1 index", field=f"{where}.kept_indices")
    if not view.HasField("features"):
        raise InvalidInput(
            f"is missing, expected a tensor of shape ({len(kept)}, {facts.hidden_size})",
            reason="MISSING_FIELD",
            field=f"{field}.features",
        )
    features = tensors.from_proto(
        view.features, field=f"{field}.features", shape=(len(kept), facts.hidden_size), finite=True
    )
    prefix = None
    if view.HasField("prefix_features"):
        prefix = tensors.from_proto(
            view.prefix_features,
            field=f"{field}.prefix_features",
            shape=(None, facts.hidden_size),
            finite=True,
        )
    return VisualView(features, torch.tensor(kept, dtype=torch.long), grid, prefix, valid)
