"""Views and a policy in, pruned views out: the seam between the wire's messages and the pure selection.

Checks the views it is given. Knows no cache, no encoder and no text model: a similarity comes in ready.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from hiprune import tensors
from hiprune.errors import InvalidInput
from hiprune.tensors import Memory
from hiprune.v1 import encoder_service_pb2, pruner_service_pb2
from services.pruner import selection
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


def prune(
    views: Sequence[View], policy: Policy, guidance: Guidance, *, seed: bytes, memory: Memory | None = None
) -> Pruned:
    """Prunes checked views. `seed` is the digest behind RANDOM.

    Raises InvalidInput naming `views[i].attention` when the scores that the method reads are missing or
    unfit, and `policy.keep_count` when a view would keep nothing.
    """
    masks = [_valid_mask(view) for view in views]
    # tokens outside the grid are always kept, and count
    prefix = _prefix_of(views[0])
    counts = [
        prefix + (int(mask.sum()) if mask is not None else view.grid_height * view.grid_width)
        for view, mask in zip(views, masks, strict=True)
    ]
    budgets = policy.keep_per_view(counts, prefix)
    pruned = []
    for number, (view, mask, budget) in enumerate(zip(views, masks, budgets, strict=True)):
        similarity = guidance.similarities[number] if guidance.similarities is not None else None
        object_scores = deep_scores = None
        if policy.reads_attention:
            object_scores = _scores(view, policy.object_layer, number)
            deep_scores = _scores(view, policy.deep_layer, number)
        own_seed = hashlib.sha256(seed + number.to_bytes(4, "little")).digest()
        scores = (object_scores, deep_scores, similarity)
        kept = _select(policy, max(1, budget - prefix), view, mask, scores, own_seed)
        pruned.append(_pruned_view(view, kept, memory))
        if policy.include_scores:
            _add_scores(pruned[-1].selection.scores, object_scores, deep_scores, similarity)
    summary = pruner_service_pb2.PruneSummary(
        policy=policy.to_proto(),
        tokens_before=sum(counts),
        tokens_requested=policy.requested(counts),
        tokens_kept=sum(prefix + len(view.selection.kept_indices) for view in pruned),
        deep_layer=policy.deep_layer if policy.reads_attention else 0,
    )
    if policy.reads_text:
        summary.text_model = guidance.text_model
        summary.text_note = guidance.note
        chosen = any(pruner_service_pb2.TOKEN_KIND_TEXT in view.selection.kinds for view in pruned)
        if guidance.similarities is not None and not chosen:
            summary.text_note = "the budget leaves no token to the question"
    return Pruned(pruned, summary)


def _select(
    policy: Policy,
    keep: int,
    view: View,
    valid: Mask | None,
    scores: tuple[Scores | None, Scores | None, Scores | None],
    seed: bytes,
) -> Selection:
    """`keep` tokens of one view's grid by the policy's method. `scores`: object, deep, similarity."""
    count = view.grid_height * view.grid_width
    object_scores, deep_scores, similarity = scores
    if policy.reads_attention and object_scores is not None and deep_scores is not None:
        return selection.hiprune_plus_plus(
            object_scores,
            deep_scores,
            similarity if policy.reads_text else None,
            width=view.grid_width,
            keep=keep,
            alpha=policy.alpha,
            beta=policy.beta,
            buffer=policy.buffer,
            text_budget=policy.text_budget,
            valid=valid,
        )
    match policy.method:
        case pruner_service_pb2.METHOD_RANDOM:
            return selection.random_tokens(count, keep=keep, seed=seed, valid=valid)
        case pruner_service_pb2.METHOD_STRIDED:
            return selection.strided(count, keep=keep, valid=valid)
        case _:
            return selection.everything(count, valid=valid)


def _valid_mask(view: View) -> Mask | None:
    """Which of a view's tokens are not padding, (N,); None: all of them."""
    if not view.HasField("valid"):
        return None
    region = view.valid
    mask = np.zeros((view.grid_height, view.grid_width), dtype=np.bool_)  # (H, W)
    mask[region.top : region.top + region.height, region.left : region.left + region.width] = True
    return mask.ravel()


def _scores(view: View, layer: int, number: int) -> Scores:
    """One layer's scores (N,) of a view. Raises InvalidInput when they are missing or unfit."""
    count = view.grid_height * view.grid_width
    for place, entry in enumerate(view.attention):
        if entry.layer == layer:
            field = f"views[{number}].attention[{place}].scores"
            scores = tensors.from_proto(
                entry.scores, field=field, shape=(count,), dtypes=(torch.float32,), finite=True
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


def _add_scores(
    message: pruner_service_pb2.SelectionScores,
    object_scores: Scores | None,
    deep_scores: Scores | None,
    similarity: Scores | None,
) -> None:
    message.SetInParent()  # present, as asked for, also where no score is there to show
    named = ((message.object, object_scores), (message.deep, deep_scores), (message.similarity, similarity))
    for target, scores in named:
        if scores is not None:
            target.CopyFrom(tensors.to_proto(torch.from_numpy(np.ascontiguousarray(scores))))


def _cosine(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Cosine similarity (N,) float32 of `rows` (N, A) with `vector` (A,), any float dtypes."""
    normalised = torch.nn.functional.normalize(rows.float(), dim=1)
    similarity: torch.Tensor = normalised @ torch.nn.functional.normalize(vector.float(), dim=0)
    return similarity
