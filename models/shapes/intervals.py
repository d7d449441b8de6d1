"""How sure a share is: intervals at 95 %. Knows no question and no method.

Questions about one scene are not independent, so whole scenes are drawn anew (Efron's bootstrap, by
clusters). A share of 0 or 1 is the same in every draw: it gets Wilson's interval, of as many as scenes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

_Z: Final = 1.959964
DRAWS: Final = 2000

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its interval."""

    value: float
    low: float
    high: float

    def content(self, digits: int = 4) -> dict[str, float]:
        """As JSON."""
        return {
            "value": round(self.value, digits),
            "low": round(self.low, digits),
            "high": round(self.high, digits),
        }


def wilson(right: float, number: int) -> Estimate:
    """The share `right / number` with Wilson's score interval; `right` may be a mean over draws."""
    if number < 1:
        raise ValueError(f"{number} questions, expected at least 1")
    share, spread = right / number, _Z * _Z / number
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / number + spread / (4 * number))
    # at either end rounding may leave the value outside by the last bit
    return Estimate(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


class Bootstrap:
    """Draws of S scenes, the same for everything that is compared.

    `asked` (S, T) counts each scene's questions by type. Means are over types, each type counting alike.
    """

    def __init__(self, asked: Matrix, seed: int) -> None:
        scenes = len(asked)
        draw = np.random.default_rng([seed, 3])
        self._weights = np.vstack(
            [np.ones(scenes), draw.multinomial(scenes, np.full(scenes, 1 / scenes), DRAWS)]
        )  # (1 + DRAWS, S): the scenes as they are, then the draws
        self._asked = self._weights @ asked  # (1 + DRAWS, T)

    def accuracies(self, right: Matrix) -> Matrix:
        """Accuracy of every draw and type, (1 + DRAWS, T), of right answers (S, T); NaN of none asked."""
        with np.errstate(invalid="ignore"):
            found: Matrix = self._weights @ right / np.where(self._asked > 0, self._asked, np.nan)
        return found

    def mean(self, right: Matrix) -> Matrix:
        """Mean over types of every draw, (1 + DRAWS,)."""
        means: Matrix = np.nanmean(self.accuracies(right), axis=1)
        return means


def estimate(draws: Matrix) -> Estimate:
    """The first of `draws` (1 + DRAWS,), with the middle 95 % of the others."""
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    return Estimate(float(draws[0]), float(low), float(high))
