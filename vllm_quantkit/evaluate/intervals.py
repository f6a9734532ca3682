"""How sure a mean over windows of text is.

Tokens of a window depend on each other, windows chosen from a text hardly do: so windows, not
tokens, are what is counted. Intervals are Student's over the windows' sums; one over so few windows
covers better than percentiles of a bootstrap, which are too narrow there
(https://doi.org/10.1080/00031305.2015.1089789).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from vllm_quantkit.spec import Frozen

CONFIDENCE = 0.95
"""Of every interval."""


class Interval(Frozen):
    """A figure, and where it would be for other windows of the same kind of text.

    Attributes:
        value: as measured.
        low, high: 95 % confidence.
    """

    value: float
    low: float
    high: float

    def mapped(self, rising: Callable[[float], float]) -> Interval:
        """The interval of a rising function of the figure."""
        return Interval(value=rising(self.value), low=rising(self.low), high=rising(self.high))

    def within(self, low: float, high: float) -> Interval:
        """The interval cut to what is possible at all."""
        return Interval(
            value=self.value,
            low=min(max(self.low, low), high),
            high=min(max(self.high, low), high),
        )


def mean_interval(sums: Sequence[float], counts: Sequence[int]) -> Interval:
    """m = sum(s_w) / n of W windows, n = sum(n_w); m -+ t sqrt(W / (W-1) sum((s_w - m n_w)^2)) / n.

    Args:
        sums: of the tokens' values in each of W windows, W of at least 2.
        counts: tokens in each window.
    """
    s, n = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    windows, mean = len(s), float(s.sum() / n.sum())
    if not math.isfinite(mean):
        return Interval(value=mean, low=mean, high=mean)
    residuals = s - mean * n
    error = math.sqrt(windows / (windows - 1) * float(residuals @ residuals)) / float(n.sum())
    reach = float(student_quantile((1 + CONFIDENCE) / 2, windows - 1)) * error
    return Interval(value=mean, low=mean - reach, high=mean + reach)


def normal_interval(value: float, error: float) -> Interval:
    """value -+ 1.96 error, of a standard error known from many samples."""
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    return Interval(value=value, low=value - reach, high=value + reach)


def student_quantile(p: float, freedom: int) -> float:
    """t with P(T < t) = p for Student's distribution, to 1 % at 3 degrees of freedom, else closer.

    Exact for 1 and 2; above, the expansion 26.7.5 of Abramowitz and Stegun
    (https://personal.math.ubc.ca/~cbm/aands/page_949.htm).
    """
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    x = NormalDist().inv_cdf(p)
    terms: tuple[float, ...] = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / float(freedom) ** (i + 1) for i, term in enumerate(terms))
