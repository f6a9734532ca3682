"""What rounds of a measurement say: medians, spreads, and ratios that were measured in pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

from pydantic import Field

from vllm_quantkit.spec import Frozen

NOISY = 0.10
"""Spread beyond which a sample is called noisy."""

CONFIDENCE = 0.95
"""Of the interval of a ratio, where there are enough rounds for it."""

LEAST_CONFIDENCE = 0.93
"""Fewer than five rounds say nothing: their whole range holds the median in less than 93 %."""

ALIKE = 0.03
"""Two speeds whose ratio lies within so much of 1, interval and all, are the same."""

Better = Literal["higher", "lower"]
"""Which of two values is the faster: a rate's higher, a time's lower."""

Verdict = Literal["faster", "slower", "alike", "undecided"]


class Sample(Frozen):
    """One quantity, measured in several rounds.

    Attributes:
        median: of the rounds.
        low: the least of them.
        high: the largest.
        rounds: values in the order in which they were measured.
        noisy: True where the spread is larger than `NOISY`.
    """

    median: float
    low: float
    high: float
    rounds: tuple[float, ...] = Field(min_length=1)
    noisy: bool

    @classmethod
    def of(cls, rounds: Iterable[float]) -> Sample:
        """The sample of these values, of which there must be one at least."""
        values = tuple(rounds)
        return cls(
            median=median(values),
            low=min(values),
            high=max(values),
            rounds=values,
            noisy=spread(values) > NOISY,
        )

    @property
    def spread(self) -> float:
        """Relative, see `spread`."""
        return spread(self.rounds)


class Ratio(Frozen):
    """How many times as fast one is as another, measured in the same rounds.

    Attributes:
        median: of the rounds' ratios.
        low: end of the interval in which the true median lies.
        high: the other end.
        confidence: of that interval.
    """

    median: float
    low: float
    high: float
    confidence: float

    @property
    def verdict(self) -> Verdict:
        """What the interval allows to say."""
        if self.confidence < LEAST_CONFIDENCE:
            return "undecided"
        if self.low > 1 - ALIKE and self.high < 1 + ALIKE:
            return "alike"
        if self.low <= 1 <= self.high:
            return "undecided"
        return "faster" if self.low > 1 else "slower"


def spread(values: Sequence[float]) -> float:
    """1.4826 median|x - median(x)| / median(x): a standard deviation that outliers do not move."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values) / middle


def speed_up(ours: Sample, base: Sample, better: Better) -> Ratio:
    """Median of ours / base by round, or of base / ours for times, with its interval.

    The interval is the sign test's, which assumes nothing about how values are distributed: in
    the order of the n ratios, that from the k-th least to the k-th largest holds the true median
    with probability 1 - 2 P(B < k), where B is binomial(n, 1/2). It is the narrowest that reaches
    `CONFIDENCE`, or the whole range where none does.
    https://www.itl.nist.gov/div898/handbook/prc/section2/prc25.htm

    Raises:
        ValueError: the samples have different numbers of rounds.
    """
    pairs = zip(ours.rounds, base.rounds, strict=True)
    ratios = sorted(a / b if better == "higher" else b / a for a, b in pairs)
    k, confidence = order_of_interval(len(ratios))
    return Ratio(median=median(ratios), low=ratios[k - 1], high=ratios[-k], confidence=confidence)


def order_of_interval(n: int) -> tuple[int, float]:
    """The largest k whose interval reaches `CONFIDENCE`, else 1; and the confidence it has."""
    outside, k = 0.5**n, 1
    while (wider := outside + math.comb(n, k) * 0.5**n) <= (1 - CONFIDENCE) / 2:
        outside, k = wider, k + 1
    return k, 1 - 2 * outside


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
