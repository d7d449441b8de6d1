"""The policy of a request, checked and with every default filled in, and its canonical bytes for cache keys.

Knows the wire's PrunePolicy and a family's facts; chooses no token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from hiprune.budgets import Budget
from hiprune.errors import InvalidInput
from hiprune.families import Facts
from hiprune.v1 import pruner_service_pb2 as pb
from services.pruner.selection import BufferShape, TextBudget

DEFAULT_KEEP_RATIO: Final = 1 / 3
"""192 of LLaVA-1.5's 576 tokens: the paper's largest budget."""
DEFAULT_ALPHA: Final = 0.1
DEFAULT_BETA: Final = 0.1

_READS_OBJECT: Final = frozenset({pb.METHOD_HIPRUNE, pb.METHOD_HIPRUNE_PLUS_PLUS})
_READS_DEEP: Final = _READS_OBJECT | {pb.METHOD_VISIONZIP}


@dataclass(frozen=True, slots=True)
class Policy:
    """A checked policy. Exactly one of keep_count and keep_ratio is set; NONE ignores both."""

    method: pb.Method.ValueType
    keep_count: int | None
    keep_ratio: float | None
    alpha: float
    object_layer: int
    deep_layer: int
    beta: float
    buffer: BufferShape
    text_budget: TextBudget
    include_scores: bool
    ratio_of: Literal["media", "view"] = "media"
    has_cls: bool = False
    """Whether the deep layer's attention from CLS is there to be read."""

    @property
    def reads_object(self) -> bool:
        """Whether the method looks at the object layer's scores."""
        return self.method in _READS_OBJECT

    @property
    def reads_deep(self) -> bool:
        """Whether the method looks at the deep layer, be it at its scores or at its attention from CLS."""
        return self.method in _READS_DEEP

    @property
    def reads_cls(self) -> bool:
        """Whether the method looks at the deep layer's attention from CLS, and not at its scores."""
        return self.method == pb.METHOD_VISIONZIP and self.has_cls

    @property
    def reads_features(self) -> bool:
        """Whether the method looks at the tokens themselves."""
        return self.method == pb.METHOD_DIVPRUNE

    @property
    def reads_text(self) -> bool:
        """Whether the method looks at the question."""
        return self.method == pb.METHOD_HIPRUNE_PLUS_PLUS

    @property
    def budget(self) -> Budget:
        """How many tokens, and of what; NONE asks for all."""
        if self.method == pb.METHOD_NONE:
            return Budget()
        return Budget(self.keep_count, self.keep_ratio, self.ratio_of)

    def keep_per_view(self, counts: Sequence[int], prefix: int = 0) -> list[int]:
        """The budget K of each view: see `Budget.per_view`. Raises InvalidInput (`policy.keep_count`)."""
        return self.budget.per_view(counts, prefix)

    def requested(self, counts: Sequence[int]) -> int:
        """The budget in tokens over all views, as it was asked for."""
        return self.budget.requested(counts)

    def canonical(self, tokens: int | None) -> bytes:
        """Bytes that are equal exactly for policies of one answer: fields that the method ignores are out.

        Where every media item has the same number of `tokens`, a ratio becomes its count, so that 1/3 and 65
        of 196 are one entry.
        """
        fields: list[object] = [int(self.method), self.include_scores]
        if self.method != pb.METHOD_NONE:
            if tokens is not None:
                fields.append(["count", self.requested([tokens])])
            elif self.keep_count is not None:
                fields.append(["count", self.keep_count])
            else:
                fields.append(["ratio", repr(self.keep_ratio)])
        if self.reads_object:
            fields += [repr(self.alpha), self.object_layer, self.deep_layer, int(self.buffer)]
        elif self.reads_deep:
            fields += [self.deep_layer, self.has_cls]
        if self.reads_text:
            fields += [repr(self.beta), int(self.text_budget)]
        return json.dumps(fields, separators=(",", ":")).encode()

    def to_proto(self) -> pb.PrunePolicy:
        """The policy as an answer reports it: every default filled in."""
        message = pb.PrunePolicy(
            method=self.method,
            alpha=self.alpha,
            object_layer=self.object_layer,
            beta=self.beta,
            buffer=pb.BufferShape.ValueType(int(self.buffer)),
            text_budget=pb.TextBudget.ValueType(int(self.text_budget)),
            include_scores=self.include_scores,
        )
        if self.keep_count is not None:
            message.keep_count = self.keep_count
        elif self.keep_ratio is not None:
            message.keep_ratio = self.keep_ratio
        return message


def resolve(message: pb.PrunePolicy, facts: Facts) -> Policy:
    """The policy for a family's own images. Raises InvalidInput naming `policy.…`."""
    return resolve_layers(
        message,
        object_layer=facts.object_layer,
        deep_layer=facts.deep_layer,
        ratio_of=facts.ratio_of,
        has_cls=facts.has_cls,
    )


def resolve_layers(
    message: pb.PrunePolicy,
    *,
    object_layer: int,
    deep_layer: int,
    ratio_of: Literal["media", "view"] = "view",
    has_cls: bool = False,
) -> Policy:
    """The policy, given the default object layer and the deep layer. Raises InvalidInput (`policy.…`).

    `has_cls` says that attention from CLS is recorded in the deep layer.
    """
    method = _known(message.method, pb.Method.keys(), "policy.method") or pb.METHOD_HIPRUNE
    buffer = _known(message.buffer, pb.BufferShape.keys(), "policy.buffer") or pb.BUFFER_SHAPE_FLAT
    text_budget = (
        _known(message.text_budget, pb.TextBudget.keys(), "policy.text_budget") or pb.TEXT_BUDGET_INSIDE
    )
    budget = message.WhichOneof("budget")
    keep_count = message.keep_count if budget == "keep_count" else None
    keep_ratio = message.keep_ratio if budget == "keep_ratio" else None
    if keep_count is None and keep_ratio is None:
        keep_ratio = DEFAULT_KEEP_RATIO
    if keep_count is not None and keep_count < 1:
        raise InvalidInput(f"{keep_count} tokens; expected at least 1", field="policy.keep_count")
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise InvalidInput(f"{keep_ratio} is outside (0, 1]", field="policy.keep_ratio")
    chosen_layer = message.object_layer if message.HasField("object_layer") else object_layer
    if not 1 <= chosen_layer <= deep_layer:
        raise InvalidInput(f"{chosen_layer} is outside [1, {deep_layer}]", field="policy.object_layer")
    return Policy(
        method=pb.Method.ValueType(method),
        keep_count=keep_count,
        keep_ratio=keep_ratio,
        alpha=_share(message.alpha if message.HasField("alpha") else DEFAULT_ALPHA, "policy.alpha"),
        object_layer=chosen_layer,
        deep_layer=deep_layer,
        beta=_share(message.beta if message.HasField("beta") else DEFAULT_BETA, "policy.beta"),
        buffer=BufferShape(buffer),
        text_budget=TextBudget(text_budget),
        include_scores=message.include_scores,
        ratio_of=ratio_of,
        has_cls=has_cls,
    )


def _share(value: float, field: str) -> float:
    if not 0 <= value <= 1:  # written so that NaN fails too
        raise InvalidInput(f"{value} is outside [0, 1]", field=field)
    return value


def _known(value: int, names: Sequence[str], field: str) -> int:
    """An enum's number; proto3 lets any number through, so unknown ones are refused here."""
    if not 0 <= value < len(names):
        raise InvalidInput(f"{value} is unknown, expected 1 to {len(names) - 1}", field=field)
    return value
