"""How many tokens are kept: a ratio or a count, shared out over the views of one image. Knows no method.

Letters: N tokens of one view, V views, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hiprune.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Budget:
    """What is asked for; neither a count nor a ratio: everything."""

    keep_count: int | None = None
    keep_ratio: float | None = None
    ratio_of: Literal["media", "view"] = "media"
    """What a ratio counts: all tokens together, shared out evenly over the views, or each view's."""

    def requested(self, counts: Sequence[int]) -> int:
        """Tokens over all views, whose numbers of tokens are `counts`, as it was asked for."""
        if self.keep_count is not None:
            return self.keep_count
        if self.keep_ratio is None:
            return sum(counts)
        if self.ratio_of == "view":
            return sum(keep_of_ratio(self.keep_ratio, count) for count in counts)
        return keep_of_ratio(self.keep_ratio, sum(counts))

    def per_view(self, counts: Sequence[int], prefix: int = 0) -> list[int]:
        """The budget K of each view, whose token counts are given, padding left out.

        A count is shared out evenly, `K // V` a view; so is a ratio, unless it is taken of each view. What
        asks for all tokens keeps them all. `prefix` of a view's tokens lie outside its grid, are always kept,
        and count; at least one token of the grid is kept besides.
        Raises InvalidInput (`policy.keep_count`) when a view would get less than that.
        """
        total, views, least = sum(counts), len(counts), 1 + prefix
        if self.keep_ratio is not None and self.ratio_of == "view":
            return [max(least, keep_of_ratio(self.keep_ratio, count)) for count in counts]
        asked = self.requested(counts)
        if asked >= total:
            return list(counts)
        if self.keep_ratio is not None:
            return [max(least, asked // views)] * views
        if asked < least * views:
            raise InvalidInput(
                f"{asked} tokens for {views} views; expected at least {least} a view",
                field="policy.keep_count",
            )
        return [asked // views] * views


def keep_of_ratio(ratio: float, n: int) -> int:
    """The budget K of a retention ratio: `max(1, round(ratio * n))`, halves to the even number.

    `ratio` is in (0, 1]; `n` >= 0 is the number of tokens that the ratio counts, padding left out.
    Raises InvalidInput (`policy.keep_ratio`, or `features` for a negative n).
    """
    if not 0 < ratio <= 1:  # written so that NaN fails too
        raise InvalidInput(f"{ratio} is outside (0, 1]", field="policy.keep_ratio")
    if n < 0:
        raise InvalidInput(f"{n} tokens; expected at least 0", field="features")
    return max(1, round(ratio * n))
