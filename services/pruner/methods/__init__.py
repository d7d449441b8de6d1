"""Every method behind one interface: one view's tokens and a budget in, kept indices out.

A method is a function `select(tokens, keep, policy)`, and a module here; its policy says what of `Tokens` it
reads (`Policy.reads_…`), and only that is there. Adding one is a module, a number in the wire's `Method`, a
line below and one in `policy.py`. Knows no wire message but that enum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from hiprune.v1 import pruner_service_pb2 as pb
from services.pruner.methods import controls, divprune, hiprune, visionzip
from services.pruner.methods.tokens import Tokens
from services.pruner.policy import Policy
from services.pruner.selection import Selection

Method: TypeAlias = Callable[[Tokens, int, Policy], Selection]

METHODS: Final[Mapping[pb.Method.ValueType, Method]] = {
    pb.METHOD_NONE: controls.everything,
    pb.METHOD_HIPRUNE: hiprune.select,
    pb.METHOD_HIPRUNE_PLUS_PLUS: hiprune.select,
    pb.METHOD_RANDOM: controls.random,
    pb.METHOD_STRIDED: controls.strided,
    pb.METHOD_VISIONZIP: visionzip.select,
    pb.METHOD_DIVPRUNE: divprune.select,
}


def select(tokens: Tokens, keep: int, policy: Policy) -> Selection:
    """`keep` ≥ 1 tokens of one view, at most, by the policy's method. Raises InvalidInput."""
    return METHODS[policy.method](tokens, keep, policy)
