"""Views and a policy in, pruned views out: the seam between the wire's messages and the pure selection.

Checks the views it is given. Knows no cache, no encoder and no text model: a similarity comes in ready.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from hiprune import tensors
from hiprune.errors import InvalidInput
from hiprune.tensors import Memory
from hiprune.v1 import encoder_service_pb2, pruner_service_pb2
from services.pruner import methods
from services.pruner.methods import divprune
from services.pruner.methods.tokens import Tokens
from services.pruner.policy import Policy
from services.pruner.selection import Selection

View = encoder_service_pb2.View
MAX_LAYERS: Final = 256
"""Most layers of which a view brings scores; the deepest vision towers have about 64."""
Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Guidance:
    """What text guidance compares the tokens with, for each view, or why there is none."""

    similarities: Sequence[Scores] | None = None  # V × (N,)
    text_model: str = ""
    note: str = ""


NO_QUESTION = Guidance(note="no question")


@dataclass(frozen=True, slots=True)
class Pruned:
    """What is left of one media item, and the summary for its report."""

    views: list[pruner_service_pb2.PrunedView]
    summary: pruner_service_pb2.PruneSummary


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy asks of views, known before anything of them is read."""

    prefix: int
    """Tokens outside the grid in each view: always kept, and they count."""
    counts: Sequence[int]
    """Of each view, all of its tokens that are not padding."""
    keeps: Sequence[int]
    """Of each view, how many of its grid are kept, at most."""
    work: int
    """Multiply-adds of comparing tokens with each other; 0 where the method does not."""

    @property
    def kept(self) -> int:
        """Tokens that are kept, by every method that spends its budget and no more."""
        return sum(
            self.prefix + min(keep, count - self.prefix)
            for count, keep in zip(self.counts, self.keeps, strict=True)
        )


def check_views(views: Sequence[View], *, max_tokens: int, memory: Memory | None = None) -> None:
    """Refuses views whose tensors do not fit their grids or each other, and too many tokens in all.

    A few bytes can claim a large grid, and the answer would hold an index for each of its tokens. Rows may
    lie in `memory`, here and below: that of an encoder that was asked to.
    Raises InvalidInput naming `views[i].…`.
    """
    if not views:
        raise InvalidInput("none, expected at least 1", field="views", reason="MISSING_FIELD")
    total = 0
    for number, view in enumerate(views):
        field = f"views[{number}]"
        for name, extent in (("grid_height", view.grid_height), ("grid_width", view.grid_width)):
            if not 1 <= extent <= max_tokens:
                raise InvalidInput(f"{extent} is outside [1, {max_tokens}]", field=f"{field}.{name}")
        count = view.grid_height * view.grid_width
        total += count
        if total > max_tokens:
            raise InvalidInput(
                f"{view.grid_height} × {view.grid_width} makes {total} tokens, expected at most {max_tokens} "
                "over all views",
                field=f"{field}.grid_height",
                reason="LIMIT_EXCEEDED",
            )
        if view.HasField("features"):
            tensors.check(view.features, field=f"{field}.features", shape=(count, None), memory=memory)
        if view.HasField("aligned"):
            tensors.check(view.aligned, field=f"{field}.aligned", shape=(count, None), memory=memory)
        if view.HasField("prefix_features"):
            width = view.features.shape[1] if view.HasField("features") else None
            tensors.check(view.prefix_features, field=f"{field}.prefix_features", shape=(None, width))
        if _prefix_of(view) != _prefix_of(views[0]):
            raise InvalidInput(
                f"{_prefix_of(view)} tokens outside the grid, expected {_prefix_of(views[0])} as in views[0]",
                field=f"{field}.prefix_features",
            )
        if view.HasField("valid"):
            _check_region(view, field)
        _check_attention(view, field)


def _check_attention(view: View, field: str) -> None:
    """Refuses too many layers, and one that is none or comes twice; scores wait until they are read."""
    if len(view.attention) > MAX_LAYERS:
        raise InvalidInput(
            f"{len(view.attention)} layers, expected at most {MAX_LAYERS}",
            field=f"{field}.attention",
            reason="LIMIT_EXCEEDED",
        )
    seen: set[int] = set()
    for place, entry in enumerate(view.attention):
        if entry.layer < 1 or entry.layer in seen:
            raise InvalidInput(
                f"{entry.layer}, expected at least 1 and no layer twice",
                field=f"{field}.attention[{place}].layer",
            )
        seen.add(entry.layer)


def _prefix_of(view: View) -> int:
    """Tokens of a checked view that lie outside its grid; rows of no channels are none."""
    shape = view.prefix_features.shape
    return shape[0] if shape and all(shape) else 0


def _check_region(view: View, field: str) -> None:
    """Refuses a valid region that is not inside its grid."""
    region = view.valid
    sides = (
        ("top", region.top, view.grid_height),
        ("left", region.left, view.grid_width),
        ("height", region.height, view.grid_height - region.top),
        ("width", region.width, view.grid_width - region.left),
    )
    for name, value, most in sides:
        if not 0 <= value <= most:
            raise InvalidInput(f"{value} is outside [0, {most}]", field=f"{field}.valid.{name}")


def similarities(
    views: Sequence[View],
    vector: torch.Tensor,
    *,
    space: str = "aligned",
    field: str = "text_vector",
    memory: Memory | None = None,
) -> list[Scores]:
    """Cosine of each token of each view's `space` ("aligned" or "features") with `vector` (A,): V × (N,).

    Raises InvalidInput when widths differ, or when the result is not finite.
    """
    found = []
    for number, view in enumerate(views):
        message = getattr(view, space)
        count = view.grid_height * view.grid_width
        rows = tensors.from_proto(
            message, field=f"views[{number}].{space}", shape=(count, None), finite=True, memory=memory
        )
        if rows.shape[1] != vector.shape[0]:
            raise InvalidInput(
                f"{vector.shape[0]} channels, expected {rows.shape[1]} as in views[{number}].{space}",
                field=field,
            )
        found.append(_cosine(rows, vector).numpy())
    return found


def plan(views: Sequence[View], policy: Policy) -> Plan:
    """What a policy asks of checked views. Takes no time to speak of.

    Raises InvalidInput naming `policy.keep_count` when a view would keep nothing, `views[i].features` where
    the method reads them and there are none, and `policy.method` for one that would take too long over so
    many tokens.
    """
    prefix = _prefix_of(views[0])
    counts = [prefix + _valid_count(view) for view in views]
    keeps = [max(1, budget - prefix) for budget in policy.keep_per_view(counts, prefix)]
    work = _work(views, [count - prefix for count in counts], keeps) if policy.reads_features else 0
    return Plan(prefix, counts, keeps, work)


def prune(
    views: Sequence[View],
    policy: Policy,
    guidance: Guidance,
    *,
    seed: bytes,
    memory: Memory | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Pruned:
    """Prunes checked views. `seed` is the digest behind RANDOM; what takes long asks `is_wanted`.

    Raises InvalidInput as `plan`, and naming `views[i].attention` or `views[i].features` when what the method
    reads is missing or unfit; Unwanted.
    """
    planned = plan(views, policy)
    prefix, counts = planned.prefix, planned.counts
    pruned = []
    for number, (view, keep) in enumerate(zip(views, planned.keeps, strict=True)):
        tokens = Tokens(
            count=view.grid_height * view.grid_width,
            width=view.grid_width,
            valid=_valid_mask(view),
            object_scores=_scores(view, policy.object_layer, number) if policy.reads_object else None,
            deep_scores=_scores(view, policy.deep_layer, number)
            if policy.reads_deep and not policy.reads_cls
            else None,
            cls_scores=_scores(view, policy.deep_layer, number, "cls_scores") if policy.reads_cls else None,
            similarity=guidance.similarities[number] if guidance.similarities is not None else None,
            features=_features(view, number, memory) if policy.reads_features else None,
            seed=hashlib.sha256(seed + number.to_bytes(4, "little")).digest(),
            is_wanted=is_wanted,
        )
        kept = methods.select(tokens, keep, policy)
        pruned.append(_pruned_view(view, kept, memory))
        if policy.include_scores:
            _add_scores(pruned[-1].selection.scores, tokens)
    summary = pruner_service_pb2.PruneSummary(
        policy=policy.to_proto(),
        tokens_before=sum(counts),
        tokens_requested=policy.requested(counts),
        tokens_kept=sum(prefix + len(view.selection.kept_indices) for view in pruned),
        deep_layer=policy.deep_layer if policy.reads_deep else 0,
    )
    if policy.reads_text:
        summary.text_model = guidance.text_model
        summary.text_note = guidance.note
        chosen = any(pruner_service_pb2.TOKEN_KIND_TEXT in view.selection.kinds for view in pruned)
        if guidance.similarities is not None and not chosen:
            summary.text_note = "the budget leaves no token to the question"
    return Pruned(pruned, summary)


def _valid_count(view: View) -> int:
    """How many of a checked view's tokens are not padding."""
    region = view.valid if view.HasField("valid") else None
    return region.height * region.width if region else view.grid_height * view.grid_width


def _valid_mask(view: View) -> Mask | None:
    """Which of a view's tokens are not padding, (N,); None: all of them."""
    if not view.HasField("valid"):
        return None
    region = view.valid
    mask = np.zeros((view.grid_height, view.grid_width), dtype=np.bool_)  # (H, W)
    mask[region.top : region.top + region.height, region.left : region.left + region.width] = True
    return mask.ravel()


def _scores(view: View, layer: int, number: int, name: Literal["scores", "cls_scores"] = "scores") -> Scores:
    """One layer's scores (N,) of a view. Raises InvalidInput when they are missing or unfit."""
    count = view.grid_height * view.grid_width
    for place, entry in enumerate(view.attention):
        if entry.layer == layer:
            field = f"views[{number}].attention[{place}].{name}"
            if name == "cls_scores" and not entry.HasField(name):
                raise InvalidInput(
                    "is missing, expected attention from CLS as in other views",
                    field=field,
                    reason="MISSING_FIELD",
                )
            scores = tensors.from_proto(
                getattr(entry, name), field=field, shape=(count,), dtypes=(torch.float32,), finite=True
            )
            return scores.numpy()
    given = [entry.layer for entry in view.attention]
    raise InvalidInput(
        f"holds layers {given}, expected layer {layer} among them",
        field=f"views[{number}].attention",
        reason="MISSING_FIELD",
    )


def _pruned_view(view: View, kept: Selection, memory: Memory | None) -> pruner_service_pb2.PrunedView:
    pruned = pruner_service_pb2.PrunedView(
        selection=pruner_service_pb2.Selection(
            kept_indices=kept.indices.tolist(),
            kinds=kept.kinds.tolist(),
            grid_height=view.grid_height,
            grid_width=view.grid_width,
            frame=view.frame,
            valid=view.valid if view.HasField("valid") else None,
        )
    )
    if view.HasField("features"):
        if len(kept.indices) == view.features.shape[0]:
            pruned.features.CopyFrom(tensors.inlined(view.features, memory))
        else:
            pruned.features.CopyFrom(tensors.take_rows(view.features, kept.indices, memory))
    if view.HasField("prefix_features"):
        pruned.prefix_features.CopyFrom(view.prefix_features)
    return pruned


def _work(views: Sequence[View], counts: Sequence[int], keeps: Sequence[int]) -> int:
    """What comparing features costs. Refuses missing ones, and more than are compared in good time."""
    for number, view in enumerate(views):
        if not view.HasField("features"):
            raise InvalidInput(
                "is missing, and DIVPRUNE compares tokens by it",
                field=f"views[{number}].features",
                reason="MISSING_FIELD",
            )
    work = sum(
        divprune.work(count, keep, view.features.shape[1])
        for view, count, keep in zip(views, counts, keeps, strict=True)
    )
    if work > divprune.MAX_WORK:
        raise InvalidInput(
            f"DIVPRUNE compares every two of {sum(counts)} tokens, {work} multiply-adds, expected at most "
            f"{divprune.MAX_WORK}",
            field="policy.method",
            reason="LIMIT_EXCEEDED",
        )
    return work


def _features(view: View, number: int, memory: Memory | None) -> Scores:
    """A view's features (N, D) float32. Raises InvalidInput when they are unfit."""
    count = view.grid_height * view.grid_width
    rows = tensors.from_proto(
        view.features, field=f"views[{number}].features", shape=(count, None), finite=True, memory=memory
    )
    return rows.float().numpy()


def _add_scores(message: pruner_service_pb2.SelectionScores, tokens: Tokens) -> None:
    message.SetInParent()  # present, as asked for, also where no score is there to show
    named = (
        (message.object, tokens.object_scores),
        (message.deep, tokens.deep_scores),
        (message.cls, tokens.cls_scores),
        (message.similarity, tokens.similarity),
    )
    for target, scores in named:
        if scores is not None:
            target.CopyFrom(tensors.to_proto(torch.from_numpy(np.ascontiguousarray(scores))))


def _cosine(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Cosine similarity (N,) float32 of `rows` (N, A) with `vector` (A,), any float dtypes."""
    normalised = torch.nn.functional.normalize(rows.float(), dim=1)
    similarity: torch.Tensor = normalised @ torch.nn.functional.normalize(vector.float(), dim=0)
    return similarity
