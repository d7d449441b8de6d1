"""What to compare with: everything, a random choice, an even one. See `services.pruner.selection`."""

from __future__ import annotations

from services.pruner import selection
from services.pruner.methods.tokens import Tokens
from services.pruner.policy import Policy
from services.pruner.selection import Selection


def everything(tokens: Tokens, keep: int, policy: Policy) -> Selection:
    """All valid tokens, whatever `keep` says."""
    return selection.everything(tokens.count, valid=tokens.valid)


def random(tokens: Tokens, keep: int, policy: Policy) -> Selection:
    """A random choice, drawn from the view's seed."""
    return selection.random_tokens(tokens.count, keep=keep, seed=tokens.seed, valid=tokens.valid)


def strided(tokens: Tokens, keep: int, policy: Policy) -> Selection:
    """Evenly spaced tokens in row-major order."""
    return selection.strided(tokens.count, keep=keep, valid=tokens.valid)
