"""Which visual tokens of one view are kept: HiPrune, HiPrune++ and two controls; what peers share with them.

Scores in, kept indices out. Every function is pure: it changes none of its arguments, reads no
environment and no clock, and answers the same on every machine, for a view alone or among others.
It does not know where scores come from, how a question becomes a similarity, how a budget is divided
over views, or what a request looks like (only the names of its fields, for errors).

Letters: N tokens of one view, row-major over an H×W grid (N = H·W); K tokens kept.

Source: HiPrune, Liu et al., Findings of ACL 2026 (arXiv 2508.00553v3), and its authors' code.
Three choices where the paper leaves room:

- A token that is taken, or lies wholly in padding, is masked with -inf. The pseudo-code subtracts 1
  instead, which fails for scores above 1 and for cosines below 0.
- Equal scores go to the lower index, whatever they are compared for.
- HiPrune++ counts its text tokens inside the budget: the paper's FLOPs leave room for nothing else.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from hiprune.errors import InvalidInput

SELECTION_VERSION: Final = 1
"""Part of every cache key of a selection: raise it when any answer changes, here or in `methods/`."""

Scores: TypeAlias = npt.NDArray[np.floating[Any]]
Mask: TypeAlias = npt.NDArray[np.bool_]
Indices: TypeAlias = npt.NDArray[np.int64]
Kinds: TypeAlias = npt.NDArray[np.int8]


class TokenKind(enum.IntEnum):
    """Why a token was kept. The numbers are those of the wire's enum; 0 is "not kept" in here."""

    ANCHOR = 1
    BUFFER = 2
    REGISTER = 3
    TEXT = 4
    CONTROL = 5
    DOMINANT = 6
    DIVERSE = 7


class BufferShape(enum.IntEnum):
    """Which neighbours of an anchor are its buffers. The numbers are those of the wire's enum."""

    FLAT = 1
    """The authors' cross, in flat indices: wraps over a row's edge, clamps to token 0 or N-1."""
    GRID = 2
    """The same cross on the grid: no wrap, nothing outside. So are the shapes below."""
    SQUARE = 3
    """All eight neighbours."""
    ROTATED_CROSS = 4
    """The four diagonal neighbours."""
    ROW = 5
    """Left and right."""
    COLUMN = 6
    """Above and below."""


class TextBudget(enum.IntEnum):
    """Whether HiPrune++'s text tokens count towards K. The numbers are those of the wire's enum."""

    INSIDE = 1
    ADDITIVE = 2


@dataclass(frozen=True, slots=True)
class Selection:
    """The kept tokens of one view."""

    indices: Indices  # (K,) int64, in [0, N), ascending, unique
    kinds: Kinds  # (K,) int8, the TokenKind of each index


_CROSS: Final = ((-1, 0), (0, -1), (0, 1), (1, 0))
_DIAGONALS: Final = ((-1, -1), (-1, 1), (1, -1), (1, 1))
_OFFSETS: Final[dict[int, npt.NDArray[np.int64]]] = {
    shape: np.array(offsets, dtype=np.int64)  # (M, 2): rows down, columns right
    for shape, offsets in (
        (BufferShape.FLAT, _CROSS),
        (BufferShape.GRID, _CROSS),
        (BufferShape.SQUARE, _CROSS + _DIAGONALS),
        (BufferShape.ROTATED_CROSS, _DIAGONALS),
        (BufferShape.ROW, ((0, -1), (0, 1))),
        (BufferShape.COLUMN, ((-1, 0), (1, 0))),
    )
}


def everything(n: int, *, valid: Mask | None = None) -> Selection:
    """All valid ones of `n` >= 1 tokens, of kind CONTROL: the unpruned baseline.

    Raises InvalidInput (`features`, `valid`).
    """
    _check_count(n)
    is_open, _ = open_tokens(n, n, valid)
    return of_one_kind(np.flatnonzero(is_open), TokenKind.CONTROL)


def hiprune(
    object_scores: Scores,  # (N,) finite, object-layer score of each token
    deep_scores: Scores,  # (N,) finite, deep-layer score of each token
    *,
    width: int,  # W, with N = H·W
    keep: int,  # K >= 1, an upper bound
    alpha: float = 0.1,  # in [0, 1]: the share of K for anchors with their buffers
    buffer: BufferShape = BufferShape.FLAT,
    valid: Mask | None = None,  # (N,) bool, False where a token lies wholly in padding; None: all valid
) -> Selection:
    """HiPrune: anchors, their buffers, then registers; `min(K, valid tokens)` in all.

    1. Anchors: the `round(alpha * K / 5)` highest object-layer scores.
    2. Buffers: the anchors' neighbours. Where anchors and buffers exceed K, the anchors stay and the
       buffers go by the score of their best anchor.
    3. Registers: the highest deep-layer scores among the rest.

    Scores are compared in float32. `keep` at or above the number of valid tokens keeps all of those, and
    K above is then that number, so that kinds say what they always say.
    Raises InvalidInput (`object_scores`, `deep_scores`, `grid_width`, `policy.keep_count`,
    `policy.alpha`, `policy.buffer`, `valid`). Scores must be finite in padding too.
    """
    return hiprune_plus_plus(
        object_scores, deep_scores, None, width=width, keep=keep, alpha=alpha, buffer=buffer, valid=valid
    )


def hiprune_plus_plus(
    object_scores: Scores,  # (N,) finite
    deep_scores: Scores,  # (N,) finite
    similarity: Scores | None,  # (N,) finite, cosine of each token and the question; None: no question
    *,
    width: int,  # W, with N = H·W
    keep: int,  # K >= 1, an upper bound (but see ADDITIVE)
    alpha: float = 0.1,  # in [0, 1]
    beta: float = 0.1,  # in [0, 1]: the share of K for text tokens
    buffer: BufferShape = BufferShape.FLAT,
    text_budget: TextBudget = TextBudget.INSIDE,
    valid: Mask | None = None,  # (N,) bool
) -> Selection:
    """HiPrune++: HiPrune, then the tokens not yet kept that are most like the question.

    With `text = round(beta * K)`, halves to the even number:
    INSIDE: HiPrune keeps `K - text`, its anchors counted from that number, and text guidance the rest,
    `min(K, valid tokens)` in all. ADDITIVE: HiPrune keeps K and text guidance adds up to `text` more.
    Without a question there is no text part: the answer is HiPrune's for all of K.

    All else as `hiprune`; raises InvalidInput for `similarity`, `policy.beta` and `policy.text_budget` too.
    """
    middle = checked_scores(object_scores, "object_scores")
    deep = checked_scores(deep_scores, "deep_scores", middle.size)
    if width < 1 or middle.size % width:
        raise InvalidInput(
            f"{width} does not divide {middle.size} tokens into rows; expected a divisor of at least 1",
            field="grid_width",
        )
    _check_share(alpha, "policy.alpha")
    _check_share(beta, "policy.beta")
    if buffer not in _OFFSETS:
        raise InvalidInput(f"{buffer} is not a buffer shape; expected 1 to 6", field="policy.buffer")
    if text_budget not in (TextBudget.INSIDE, TextBudget.ADDITIVE):
        raise InvalidInput(f"{text_budget} is not a text budget; expected 1 or 2", field="policy.text_budget")
    likeness = None if similarity is None else checked_scores(similarity, "similarity", middle.size)
    is_open, count = open_tokens(middle.size, keep, valid)

    text = 0 if likeness is None else round(beta * count)
    first = count - text if text_budget == TextBudget.INSIDE else count
    kinds = np.zeros(middle.size, dtype=np.int8)  # (N,) TokenKind, 0 while not kept: the only state
    _take_hiprune(kinds, is_open, middle, deep, width=width, keep=first, alpha=alpha, buffer=buffer)
    if likeness is not None:
        _take_highest(kinds, is_open, likeness, text, TokenKind.TEXT)
    indices = np.flatnonzero(kinds).astype(np.int64, copy=False)
    return Selection(indices=indices, kinds=kinds[indices])


def random_tokens(n: int, *, keep: int, seed: bytes, valid: Mask | None = None) -> Selection:
    """A control: `min(keep, valid tokens)` of `n` >= 1 tokens, drawn from `seed`, of kind CONTROL.

    `seed` is a digest (of the image, and of the view where there are several). The draw is SHAKE-256's
    and not a numpy generator's, whose streams may change between versions. A larger `keep` of the same
    seed and mask keeps a superset. Raises InvalidInput (`features`, `policy.keep_count`, `valid`).
    """
    _check_count(n)
    is_open, count = open_tokens(n, keep, valid)
    stream = hashlib.shake_256(b"hiprune.random_tokens.1\0" + seed).digest(8 * n)
    lots = np.frombuffer(stream, dtype="<u8")  # (N,) one lot a token, also for those in padding
    candidates = np.flatnonzero(is_open)
    return of_one_kind(candidates[np.sort(highest(lots[candidates], count))], TokenKind.CONTROL)


def strided(n: int, *, keep: int, valid: Mask | None = None) -> Selection:
    """A control: `min(keep, valid tokens)` of `n` >= 1 tokens, evenly spaced, of kind CONTROL.

    Of M valid tokens in row-major order, the middle one of each of K equal stretches:
    `floor((2 j + 1) M / (2 K))` for j in 0..K-1, in integers. A stride that is a multiple of the width
    keeps a column: spacing is in the sequence, not in the plane.
    Raises InvalidInput (`features`, `policy.keep_count`, `valid`).
    """
    _check_count(n)
    is_open, count = open_tokens(n, keep, valid)
    candidates = np.flatnonzero(is_open)
    positions = (2 * np.arange(count, dtype=np.int64) + 1) * candidates.size // (2 * count)
    return of_one_kind(candidates[positions], TokenKind.CONTROL)


def _take_hiprune(
    kinds: Kinds,  # (N,) marked in place
    is_open: Mask,  # (N,) cleared in place for every token taken
    object_scores: Scores,  # (N,) float32
    deep_scores: Scores,  # (N,) float32
    *,
    width: int,
    keep: int,  # 0 to the number of open tokens
    alpha: float,
    buffer: BufferShape,
) -> None:
    """Mark exactly `keep` open tokens as anchors, buffers and registers."""
    # 5 is a cross and its centre: alpha is the share of anchors *with* buffers. Other shapes
    # keep the 5, so that choosing one changes the buffers and never the anchors.
    anchors = _take_highest(kinds, is_open, object_scores, round(alpha * keep / 5), TokenKind.ANCHOR)
    owners, targets = _neighbours(anchors, kinds.size, width, buffer)
    best_anchor = np.full(kinds.size, -np.inf, dtype=np.float32)  # (N,) -inf where no anchor is near
    np.maximum.at(best_anchor, targets, object_scores[owners])
    near = int(np.count_nonzero(is_open & (best_anchor > -np.inf)))
    _take_highest(kinds, is_open, best_anchor, min(near, keep - anchors.size), TokenKind.BUFFER)
    missing = keep - int(np.count_nonzero(kinds))
    _take_highest(kinds, is_open, deep_scores, missing, TokenKind.REGISTER)


def _neighbours(
    anchors: Indices, size: int, width: int, shape: BufferShape
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each anchor, repeated, and beside it each of its neighbours: two (P,) int64 arrays in [0, size).

    A token near two anchors appears twice; an anchor's neighbour may be an anchor, even itself.
    """
    rows_down, columns_right = _OFFSETS[shape].T
    owners = np.repeat(anchors, rows_down.size).reshape(-1, rows_down.size)  # (A, M)
    targets = owners + rows_down * width + columns_right  # (A, M)
    if shape == BufferShape.FLAT:
        return owners.ravel(), targets.clip(0, size - 1).ravel()
    rows, columns = owners // width + rows_down, owners % width + columns_right
    inside = (rows >= 0) & (rows < size // width) & (columns >= 0) & (columns < width)
    return owners[inside], targets[inside]


def _take_highest(kinds: Kinds, is_open: Mask, scores: Scores, count: int, kind: TokenKind) -> Indices:
    """Mark the `count` open tokens of highest score (all, where fewer are open) and close them.

    `kinds` and `is_open` (N,) change in place. Returns the marked indices, in no particular order.
    """
    count = min(count, int(np.count_nonzero(is_open)))
    taken = highest(np.where(is_open, scores, np.float32(-np.inf)), count)
    kinds[taken] = kind
    is_open[taken] = False
    return taken


def highest(values: npt.NDArray[Any], count: int) -> Indices:
    """The indices of the `count` highest of `values` (M,), ties to the lower index; in no order.

    Equal to `argsort(-values, kind="stable")[:count]` as a set, in O(M): the count-th highest value is
    the cut; whatever is above it is in, and what equals it fills up from the left.
    """
    if count == 0:
        return np.empty(0, dtype=np.int64)
    cut = np.partition(values, values.size - count)[values.size - count]
    above = np.flatnonzero(values > cut)
    level = np.flatnonzero(values == cut)[: count - above.size]
    return np.concatenate((above, level)).astype(np.int64, copy=False)


def of_one_kind(indices: npt.NDArray[np.intp], kind: TokenKind) -> Selection:
    """A selection of ascending `indices` (K,), all of one kind."""
    kinds = np.full(indices.size, kind, dtype=np.int8)
    return Selection(indices=indices.astype(np.int64, copy=False), kinds=kinds)


def open_tokens(n: int, keep: int, valid: Mask | None) -> tuple[Mask, int]:
    """Which of `n` tokens may be kept, (N,) bool and the caller's to change, and how many will be.

    Raises InvalidInput (`policy.keep_count`, `valid`).
    """
    if keep < 1:
        raise InvalidInput(f"{keep} tokens; expected at least 1", field="policy.keep_count")
    if valid is None:
        return np.ones(n, dtype=np.bool_), min(keep, n)
    mask = np.array(valid)
    if mask.dtype != np.bool_ or mask.shape != (n,):
        raise InvalidInput(f"{mask.dtype} of shape {mask.shape}; expected bool of ({n},)", field="valid")
    return mask, min(keep, int(np.count_nonzero(mask)))


def checked_scores(scores: Scores, field: str, n: int | None = None) -> npt.NDArray[np.float32]:
    """`scores` as float32 of shape (N,), N >= 1 and equal to `n` where given; finite, or InvalidInput."""
    given = np.asarray(scores)
    if given.dtype.kind not in "fiu":
        raise InvalidInput(f"dtype {given.dtype}; expected real numbers", field=field)
    if given.ndim != 1 or given.size < 1 or (n is not None and given.size != n):
        expected = "one score a token, at least 1" if n is None else f"({n},), one score a token"
        raise InvalidInput(f"shape {given.shape}; expected {expected}", field=field)
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite and is refused below
        cast = given.astype(np.float32, copy=False)
    finite = np.isfinite(cast)
    if not finite.all():
        where = int(finite.argmin())
        raise InvalidInput(f"token {where} is {cast[where]}; expected finite float32 numbers", field=field)
    return cast


def _check_share(share: float, field: str) -> None:
    if not 0 <= share <= 1:  # written so that NaN fails too
        raise InvalidInput(f"{share} is outside [0, 1]", field=field)


def _check_count(n: int) -> None:
    if n < 1:
        raise InvalidInput(f"{n} tokens; expected at least 1", field="features")
