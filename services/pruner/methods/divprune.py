"""DivPrune: tokens far from each other, by the cosine distance of their features. Reads no attention.

Greedy max-min diversity: first the token whose nearest other is farthest, then, again and again, the token
whose nearest chosen one is farthest. Cosine distance is `1 - cos`.

In the paper the features are the projected tokens, in the language model's space. Here they are the tower's,
before the projector, as tokens travel and are pruned before it; for Qwen2.5-VL, whose tower ends in the
language model's space, they are the same. The order of distances may differ between the two spaces.

Distances are computed in float64 and rounded to 2⁻²⁹, so that they are whole numbers: the last bits of a
matrix product, which differ between machines, decide nothing, and equal tokens are equally far. A token of
zeros is at distance 1 from all others. Ties go to the lower index; a token is never chosen twice.

The table of distances is held where it is small. Beyond `TABLE_TOKENS` each chosen token costs a pass over
all features instead, in O(N · D) memory. Either is O(N² · D) work, and so bounded: `MAX_WORK`. What a pair
costs besides its multiply-adds counts too: few channels do not make many tokens cheap.

Source: DivPrune, Alvar et al., CVPR 2025 (arXiv 2503.02175), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from hiprune.errors import InvalidInput
from services.pruner.methods.tokens import Tokens, Unwanted, required
from services.pruner.policy import Policy
from services.pruner.selection import Mask, Selection, TokenKind, of_one_kind, open_tokens

TABLE_TOKENS: Final = 4096
"""Most tokens whose table of distances, 64 MiB, is held."""
MAX_WORK: Final = 2**34
"""Most multiply-adds for one request, over all its views: 4096 tokens of 1024 channels, one or two seconds of
one core."""
_MIN_CHANNELS: Final = 64
"""What a pair counts at least: rounding its distance takes as long as so many multiply-adds."""
_PASS: Final = 4
"""What a chosen token's pass over all features counts: one row's product waits for memory, a block's not."""
_CHUNK_ELEMENTS: Final = 2**20
_UNIT: Final = 2.0**29

Features = npt.NDArray[np.floating[Any]]
Distances = npt.NDArray[np.int32]


def divprune(
    features: Features,  # (N, D) finite
    *,
    keep: int,  # K >= 1, an upper bound
    valid: Mask | None = None,  # (N,) bool, False where a token lies wholly in padding; None: all valid
    is_wanted: Callable[[], bool] = lambda: True,
) -> Selection:
    """`min(K, valid tokens)` tokens far from each other, of kind DIVERSE.

    A larger `keep` of the same tokens keeps a superset.
    Raises InvalidInput (`features`, `policy.keep_count`, `valid`), and Unwanted once `is_wanted` says no: it
    is asked before each block of distances and each choice.
    """
    given = np.asarray(features)
    if given.ndim != 2 or not given.shape[0] or given.dtype.kind != "f":
        raise InvalidInput(
            f"{given.dtype} of shape {given.shape}; expected floats, (N, D) with N at least 1",
            field="features",
        )
    is_open, count = open_tokens(given.shape[0], keep, valid)
    candidates = np.flatnonzero(is_open)
    if count < candidates.size:  # else there is nothing to choose
        candidates = candidates[np.sort(_farthest(_directions(given[candidates]), count, is_wanted))]
    return of_one_kind(candidates, TokenKind.DIVERSE)


def work(tokens: int, keep: int, channels: int) -> int:
    """A choice of `keep` among `tokens`, as multiply-adds of a block's product; 0 where there is none."""
    if keep >= tokens:
        return 0
    passes = tokens if tokens <= TABLE_TOKENS else tokens + _PASS * keep
    return tokens * passes * max(channels, _MIN_CHANNELS)


def select(tokens: Tokens, keep: int, policy: Policy) -> Selection:
    """See `divprune`."""
    features = required(tokens.features, "features")
    return divprune(features, keep=keep, valid=tokens.valid, is_wanted=tokens.is_wanted)


def _directions(rows: Features) -> npt.NDArray[np.float64]:
    """Rows (M, D) of length 1, or 0 where they were; InvalidInput (`features`) where one is not finite."""
    wide = rows.astype(np.float64)
    if not np.isfinite(wide).all():
        raise InvalidInput("not all finite, expected finite numbers", field="features")
    # by the largest first: squares of tiny numbers would vanish
    wide /= np.maximum(np.abs(wide).max(axis=1, initial=0.0, keepdims=True), np.finfo(np.float64).tiny)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)  # (M, 1)
    wide /= np.where(lengths > 0, lengths, 1.0)
    return wide


def _farthest(
    directions: npt.NDArray[np.float64], count: int, is_wanted: Callable[[], bool]
) -> npt.NDArray[np.int64]:
    """`count` of M directions (M, D), count < M, in the order in which they are chosen. Raises Unwanted."""
    size = len(directions)
    row: Callable[[int], Distances]
    nearest = np.empty(size, dtype=np.int32)  # (M,) of each, how far its nearest other is
    if size <= TABLE_TOKENS:
        table = np.empty((size, size), dtype=np.int32)
        for start, block in _blocks(directions, is_wanted):
            table[start : start + len(block)] = block
            nearest[start : start + len(block)] = block.min(axis=1)
        row = table.__getitem__
    else:
        for start, block in _blocks(directions, is_wanted):
            nearest[start : start + len(block)] = block.min(axis=1)
        row = lambda token: _distances(directions[token : token + 1], directions)[0]  # noqa: E731
    chosen = np.empty(count, dtype=np.int64)
    chosen[0] = nearest.argmax()  # the first of the highest: ties go to the lower index
    distance = np.full(size, np.iinfo(np.int32).max, dtype=np.int32)  # (M,) to the nearest chosen one
    for place in range(1, count):
        _check_wanted(is_wanted)
        last = chosen[place - 1]
        np.minimum(distance, row(int(last)), out=distance)
        distance[last] = -1  # and stays so: no distance is below 0
        chosen[place] = distance.argmax()
    return chosen


def _blocks(
    directions: npt.NDArray[np.float64], is_wanted: Callable[[], bool]
) -> Iterator[tuple[int, Distances]]:
    """Some rows of all distances at a time, and where they start; a token is farthest from itself."""
    size = len(directions)
    rows = max(1, _CHUNK_ELEMENTS // size)
    for start in range(0, size, rows):
        _check_wanted(is_wanted)
        block = _distances(directions[start : start + rows], directions)  # (≤rows, M)
        own = np.arange(len(block))
        block[own, start + own] = np.iinfo(np.int32).max
        yield start, block


def _check_wanted(is_wanted: Callable[[], bool]) -> None:
    if not is_wanted():
        raise Unwanted


def _distances(some: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> Distances:
    """`1 - cos` of directions (a, D) and (b, D), (a, b), in units of 2⁻²⁹, at least 0."""
    cosine = some @ others.T
    np.subtract(1.0, cosine, out=cosine)
    cosine *= _UNIT
    np.rint(cosine, out=cosine)
    return np.maximum(cosine, 0).astype(np.int32)
