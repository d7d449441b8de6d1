"""VisionZip's dominant tokens: those to which the most attention goes where the features are made.

With a CLS: the attention of its query, averaged over heads. Without one: the attention that a token receives
from all tokens. Both in the layer whose output is the feature, the deep layer (LLaVA: 23 of 24).

The paper keeps two kinds of tokens. The contextual ones, means of the tokens left over, merged by the
likeness of their keys, are new vectors at no place in the grid; this is the dominant-token rule for the whole
budget, as a choice among tokens is what this service returns. The paper's CLS, which it keeps as one of the
dominant tokens, is no token of the grid either, and no family here hands it to the language model for an
image.

Source: VisionZip, Yang et al., CVPR 2025 (arXiv 2412.04467), section 3.2, and its authors' code
(`attentions[-2][:, :, 0, 1:]`, the sum over heads, its highest).
"""

from __future__ import annotations

import numpy as np

from services.pruner.methods.tokens import Tokens, required
from services.pruner.policy import Policy
from services.pruner.selection import (
    Mask,
    Scores,
    Selection,
    TokenKind,
    checked_scores,
    highest,
    of_one_kind,
    open_tokens,
)


def visionzip(
    scores: Scores,  # (N,) finite, attention to each token in the deep layer, from CLS or from all
    *,
    keep: int,  # K >= 1, an upper bound
    valid: Mask | None = None,  # (N,) bool, False where a token lies wholly in padding; None: all valid
) -> Selection:
    """The `min(K, valid tokens)` highest scores, ties to the lower index; of kind DOMINANT.

    Raises InvalidInput (`scores`, `policy.keep_count`, `valid`).
    """
    attention = checked_scores(scores, "scores")
    is_open, count = open_tokens(attention.size, keep, valid)
    candidates = np.flatnonzero(is_open)
    return of_one_kind(candidates[np.sort(highest(attention[candidates], count))], TokenKind.DOMINANT)


def select(tokens: Tokens, keep: int, policy: Policy) -> Selection:
    """Attention from CLS where the policy reads that, else from all tokens."""
    scores = (
        required(tokens.cls_scores, "cls_scores")
        if policy.reads_cls
        else required(tokens.deep_scores, "deep_scores")
    )
    return visionzip(scores, keep=keep, valid=tokens.valid)
