"""HiPrune and HiPrune++: the core of `services.pruner.selection`, with the knobs of a policy."""

from __future__ import annotations

from services.pruner.methods.tokens import Tokens, required
from services.pruner.policy import Policy
from services.pruner.selection import Selection, hiprune_plus_plus


def select(tokens: Tokens, keep: int, policy: Policy) -> Selection:
    """Anchors, buffers, registers; then tokens like the question, where the policy reads it."""
    return hiprune_plus_plus(
        required(tokens.object_scores, "object_scores"),
        required(tokens.deep_scores, "deep_scores"),
        tokens.similarity if policy.reads_text else None,
        width=tokens.width,
        keep=keep,
        alpha=policy.alpha,
        beta=policy.beta,
        buffer=policy.buffer,
        text_budget=policy.text_budget,
        valid=tokens.valid,
    )
