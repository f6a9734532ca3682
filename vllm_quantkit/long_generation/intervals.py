"""95 % intervals of ratios and shares over a few prompts, which hardly depend on each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from vllm_quantkit.evaluate.intervals import CONFIDENCE, Interval, student_quantile

QUANTILE = (1 + CONFIDENCE) / 2


def ratio_of_means(above: Sequence[float], below: Sequence[float]) -> Interval:
    """r = sum(above) / sum(below), and exp(ln r -+ t s), s by leaving out one pair at a time.

    The jackknife of ln r (https://doi.org/10.1093/biomet/61.1.1): prompts with much divergence
    count for more than others, which a mean of ratios would undo. NaN where a sum is 0.

    Args:
        above, below: of the same prompts, two or more; none negative.
    """
    both = np.array([above, below], dtype=np.float64)
    totals = both.sum(axis=1)
    if not (totals > 0).all():
        return Interval(value=math.nan, low=math.nan, high=math.nan)
    ratio = float(totals[0] / totals[1])
    without = totals[:, None] - both
    if not (without > 0).all():
        return Interval(value=ratio, low=math.nan, high=math.nan)
    logs, count = np.log(without[0] / without[1]), both.shape[1]
    error = math.sqrt((count - 1) / count * float(((logs - logs.mean()) ** 2).sum()))
    reach = student_quantile(QUANTILE, count - 1) * error
    return Interval(value=ratio, low=ratio * math.exp(-reach), high=ratio * _exp(reach))


def share(count: int, total: int) -> Interval:
    """count / total, with the score interval of Wilson (https://doi.org/10.2307/2276774)."""
    z, p = NormalDist().inv_cdf(QUANTILE), count / total
    scale = 1 + z**2 / total
    middle = (p + z**2 / (2 * total)) / scale
    reach = z / scale * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    return Interval(value=p, low=middle - reach, high=middle + reach).within(0, 1)


def _exp(x: float) -> float:
    """e^x, infinite where a float cannot hold it."""
    return math.exp(x) if x < 700 else math.inf
