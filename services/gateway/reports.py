"""What was pruned of each image, as JSON: which tokens were kept and why, the scores, the policy as resolved.

Pure; knows the llm's report and the words of `pruning`, and no HTTP.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, Final

from hiprune.errors import Internal
from hiprune.policies import CACHE_WORDS, KIND_WORDS, METHOD_WORDS
from hiprune.results import milliseconds
from hiprune.v1 import llm_service_pb2, tensor_pb2
from hiprune.v1 import pruner_service_pb2 as pb

MAX_SCORES: Final = 100_000
"""Of a report, in numbers: less than a megabyte. Views whose scores would go beyond it come without them."""
_DIGITS: Final = 4
"""Of a score: enough to draw and to read, not to choose again."""


def pruning_of(
    report: llm_service_pb2.PruningReport, *, detailed: bool = False, scored: bool = False
) -> dict[str, Any]:
    """What was pruned of each image, in their order.

    `detailed`: also which tokens were kept and why; `scored`, of those: also the scores. Raises Internal.
    """
    room = _Room(MAX_SCORES if scored else 0)
    return {"images": [_image_of(media, detailed, room) for media in report.media]}


class _Room:
    """For the numbers of one report."""

    def __init__(self, most: int) -> None:
        self.asked = most > 0
        self._left = most

    def takes(self, size: int) -> bool:
        """Whether so many more fit, which takes their room."""
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits


def _image_of(media: llm_service_pb2.MediaReport, detailed: bool, room: _Room) -> dict[str, Any]:
    summary = media.summary
    found: dict[str, Any] = {
        "method": METHOD_WORDS.get(summary.policy.method),
        "tokens_before": summary.tokens_before,
        "tokens_requested": summary.tokens_requested,
        "tokens_kept": summary.tokens_kept,
        "cache": CACHE_WORDS.get(media.cache),
    }
    if summary.text_note:
        found["text_note"] = summary.text_note
    if not detailed:
        return found
    found["policy"] = _policy_of(summary)
    if summary.text_model:
        found["text_model"] = summary.text_model
    if media.layout.tile_rows:
        found["layout"] = {
            name: getattr(media.layout, name)
            for name in ("original_height", "original_width", "tile_rows", "tile_columns")
        }
    found["views"] = [_view_of(view, room) for view in media.views]
    found["timings_ms"] = milliseconds(media.timings)
    return found


def _policy_of(summary: pb.PruneSummary) -> dict[str, Any]:
    """The policy with every default filled in, in the words of `pruning`; `deep_layer` beside it."""
    policy = summary.policy
    found: dict[str, Any] = {"method": METHOD_WORDS.get(policy.method)}
    budget = policy.WhichOneof("budget")
    if budget is not None:
        found["keep"] = getattr(policy, budget)
    found |= {
        name: getattr(policy, name) for name in ("alpha", "object_layer", "beta") if policy.HasField(name)
    }
    if summary.deep_layer:
        found["deep_layer"] = summary.deep_layer
    if policy.buffer:
        found["buffer"] = pb.BufferShape.Name(policy.buffer).removeprefix("BUFFER_SHAPE_").lower()
    if policy.text_budget:
        found["text_budget"] = pb.TextBudget.Name(policy.text_budget).removeprefix("TEXT_BUDGET_").lower()
    return found


def _view_of(view: pb.Selection, room: _Room) -> dict[str, Any]:
    found: dict[str, Any] = {
        "grid_height": view.grid_height,
        "grid_width": view.grid_width,
        "kept_indices": list(view.kept_indices),
        "kinds": [KIND_WORDS.get(kind, str(kind)) for kind in view.kinds],  # a newer llm's: its number
    }
    if view.frame:
        found["frame"] = view.frame
    if view.HasField("valid"):
        found["valid"] = {name: getattr(view.valid, name) for name in ("top", "left", "height", "width")}
    present = list(_scores_of(view)) if room.asked else []
    if not present:
        return found
    size = len(present) * view.grid_height * view.grid_width
    if room.takes(size):
        told = {name: _numbers(tensor, size // len(present)) for name, tensor in present}
        unfit = [name for name, numbers in told.items() if not all(map(math.isfinite, numbers))]
        if len(unfit) < len(told):
            found["scores"] = {name: numbers for name, numbers in told.items() if name not in unfit}
        if unfit:
            found["scores_left_out"] = f"not finite: {', '.join(unfit)}"
    else:
        found["scores_left_out"] = f"more than {MAX_SCORES} numbers in all"
    return found


def _scores_of(view: pb.Selection) -> Iterator[tuple[str, tensor_pb2.Tensor]]:
    for name in ("object", "deep", "similarity", "cls"):
        if view.scores.HasField(name):
            yield name, getattr(view.scores, name)


def _numbers(tensor: tensor_pb2.Tensor, count: int) -> list[float]:
    """A vector (N,) of float32, little-endian, to a few digits. Raises Internal."""
    if tensor.dtype != tensor_pb2.DATA_TYPE_F32 or len(tensor.data) != 4 * count:
        raise Internal(f"scores of {len(tensor.data)} bytes, expected {count} float32")
    return [float(f"{each:.{_DIGITS}g}") for each in struct.unpack(f"<{count}f", tensor.data)]
