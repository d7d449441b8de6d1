"""Every way of pruning that is compared: the service's methods at each budget, and the ablations of HiPrune.

A variant says what is asked of the running service; `kept` asks it. Knows no answer and no truth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from hiprune.budgets import keep_of_ratio
from hiprune.families import Facts
from hiprune.policies import METHODS
from hiprune.v1 import pruner_service_pb2 as pb
from models.shapes.prunings import Encoded, Kept, Prunings
from services.pruner.policy import DEFAULT_ALPHA, DEFAULT_BETA
from services.pruner.selection import random_tokens

RATIOS: Final[Mapping[str, float]] = {"1/3": 1 / 3, "2/9": 2 / 9, "1/9": 1 / 9, "1/18": 1 / 18}
"""192, 128 and 64 of 576, the paper's budgets, and half of its smallest."""
ABLATED: Final = ("1/3", "1/9")
"""Budgets of the ablations: the paper's largest and smallest."""
DRAWS: Final = 3
"""Times that RANDOM draws. The first draw is the service's own, which follows from the image."""

Scores = npt.NDArray[np.float32]
Source = tuple[Literal["layer", "cls"], int]


@dataclass(frozen=True)
class Variant:
    """One way of pruning at one budget: `group` is what it is compared within, `name` its name there."""

    group: str
    name: str
    budget: str
    """A key of RATIOS, or `all`."""
    policy: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Fields of the wire's PrunePolicy, the budget apart."""
    draw: int = 0
    """Of a control that draws."""
    scores: tuple[Source, Source] | None = None
    """Whose attention makes the object and the deep scores; None: the service chooses."""
    bare: bool = False
    """Anchors without buffers."""
    served: bool = False
    """What the others of the group are compared with: the defaults."""

    def proto(self) -> pb.PrunePolicy:
        """The policy as the service takes it."""
        made = pb.PrunePolicy(**self.policy)
        if self.budget != "all":
            made.keep_ratio = RATIOS[self.budget]
        return made


def methods() -> list[Variant]:
    """NONE once, and each other method that the service knows at every budget."""
    found = [Variant("methods", "none", "all", {"method": METHODS["none"]})]
    for name, number in METHODS.items():
        if name != "none":
            for budget in RATIOS:
                for draw in range(DRAWS if name == "random" else 1):
                    found.append(Variant("methods", name, budget, {"method": number}, draw))
    return found


def ablations(facts: Facts) -> list[Variant]:
    """What the paper varies, and what is ours to vary, around the defaults."""
    middle, deep = facts.object_layer, facts.deep_layer
    sources: tuple[Source, Source] = (("layer", middle), ("layer", deep))
    found = []
    for budget in ABLATED:

        def add(
            group: str,
            name: str,
            scores: tuple[Source, Source] | None = sources,
            budget: str = budget,
            bare: bool = False,
            served: bool = False,
            **policy: Any,
        ) -> None:
            found.append(Variant(group, name, budget, policy, scores=scores, bare=bare, served=served))

        for layer in range(1, deep + 1):
            own: tuple[Source, Source] = (("layer", layer), ("layer", deep))
            add("object layer", f"{layer}", own, served=layer == middle)
            add("object layer, alpha 1", f"{layer}", own, served=layer == middle, alpha=1.0)
        for alpha in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0):
            add("alpha", f"{alpha:g}", served=alpha == DEFAULT_ALPHA, alpha=alpha)
        for beta in (0.0, 0.1, 0.2, 0.5, 1.0):
            served = beta == DEFAULT_BETA
            add("beta", f"{beta:g}", None, served=served, method=pb.METHOD_HIPRUNE_PLUS_PLUS, beta=beta)
        for shape, number in pb.BufferShape.items():
            if number:
                name = shape.removeprefix("BUFFER_SHAPE_").lower()
                add("buffer", name, served=number == pb.BUFFER_SHAPE_FLAT, buffer=number)
        add("parts", "anchors, buffers, registers", served=True)
        add("parts", "without buffers", bare=True)
        add("parts", "without anchors and buffers", alpha=0.0)
        add("parts", "without registers: object layer alone", (sources[0], sources[0]))
        for name, one, other in (
            ("all tokens, both layers", "layer", "layer"),
            ("CLS, both layers", "cls", "cls"),
            ("CLS, object layer", "cls", "layer"),
            ("CLS, deep layer", "layer", "cls"),
        ):
            add("attention from", name, ((one, middle), (other, deep)), served=one == other == "layer")
    return found


async def kept(
    variant: Variant,
    prunings: Prunings,
    image: bytes,
    encoded: Encoded,
    questions: Sequence[str],
) -> list[Kept]:
    """What each question's answer is read from; one object for all of them where the question is not read."""
    if variant.draw:
        return [_drawn(variant, image, encoded)] * len(questions)
    if variant.scores is not None:
        of = {"layer": encoded.scores, "cls": encoded.cls}
        object_scores, deep_scores = (of[kind][layer] for kind, layer in variant.scores)
        policy = variant.proto()
        if variant.bare:
            deep_scores = lifted(object_scores, deep_scores, variant)
            policy.alpha = 0.0
        return [await prunings.of_scores(encoded, policy, object_scores, deep_scores)] * len(questions)
    first = await prunings.pruned(image, variant.proto(), questions[0])
    if not first.reads_question:
        return [first] * len(questions)
    rest = [await prunings.pruned(image, variant.proto(), question) for question in questions[1:]]
    return [first, *rest]


def _drawn(variant: Variant, image: bytes, encoded: Encoded) -> Kept:
    """Another draw of RANDOM than the image's own."""
    count = len(encoded.features)
    seed = hashlib.sha256(b"draw %d" % variant.draw + image).digest()
    keep = keep_of_ratio(RATIOS[variant.budget], count)
    indices = torch.from_numpy(random_tokens(count, keep=keep, seed=seed).indices)
    return Kept(indices, encoded.features[indices].float(), reads_question=False)


def lifted(object_scores: Scores, deep_scores: Scores, variant: Variant) -> Scores:
    """Deep scores (N,) in which the anchors stand first: registers alone are then anchors and registers."""
    keep = keep_of_ratio(RATIOS[variant.budget], object_scores.size)
    count = round(variant.policy.get("alpha", DEFAULT_ALPHA) * keep / 5)
    raised = deep_scores.copy()
    raised[np.argsort(-object_scores, kind="stable")[:count]] = 1 + deep_scores.max()
    return raised
