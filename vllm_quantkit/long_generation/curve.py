"""KL divergence along a text: averaged over ranges of positions, and late beside early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vllm_quantkit.evaluate.intervals import mean_interval
from vllm_quantkit.long_generation.intervals import ratio_of_means
from vllm_quantkit.long_generation.result import Compounding, CurveBin

BINS, NARROWEST = 24, 16
"""Ranges of positions at most, and tokens in one at least: a single position's KL says little."""

QUARTER = 4
"""Early and late are the first and the last of so many parts."""

PER = 1000
"""Tokens that a slope is for."""

Curve = Sequence[float] | NDArray[np.float64]
"""KL(base || model) at each position of one continuation, nats."""


def kl_curve(curves: Sequence[Curve], bins: int = BINS) -> tuple[CurveBin, ...]:
    """Mean KL over ranges of positions of equal width, over the prompts that reach a range.

    A range that fewer than two prompts reach is left out: it would have no interval.

    Args:
        curves: prompt by prompt, of any lengths.
        bins: ranges, at most.
    """
    found = []
    for first, last in _ranges(max(map(len, curves)), bins):
        parts = [curve[first - 1 : last] for curve in curves if len(curve) >= first]
        if len(parts) > 1:
            mean = mean_interval([math.fsum(part) for part in parts], [len(part) for part in parts])
            found.append(
                CurveBin(
                    first=first,
                    last=last,
                    divergence=mean.within(0, math.inf),
                    prompts=len(parts),
                )
            )
    return tuple(found)


def compounding(curves: Sequence[Curve]) -> Compounding | None:
    """The last quarter's KL over the first's, and the slope; None where texts are too short.

    Args:
        curves: prompt by prompt; those of fewer than four positions are left out.
    """
    long_enough = [curve for curve in curves if len(curve) >= QUARTER]
    if len(long_enough) < 2:
        return None
    early = [_mean(curve[: len(curve) // QUARTER]) for curve in long_enough]
    late = [_mean(curve[-(len(curve) // QUARTER) :]) for curve in long_enough]
    return Compounding(
        early=_mean(early),
        late=_mean(late),
        ratio=ratio_of_means(late, early),
        slope=mean_interval([PER * _slope(curve) for curve in long_enough], [1] * len(early)),
    )


def _ranges(length: int, bins: int) -> list[tuple[int, int]]:
    """At most `bins` ranges of 1 .. length, of equal width and at least `NARROWEST` positions."""
    count = max(1, min(bins, length // NARROWEST))
    edges = [place * length // count for place in range(count + 1)]
    return [(before + 1, last) for before, last in pairwise(edges)]


def _slope(curve: Curve) -> float:
    """Of the least squares line: cov(position, KL) / var(position)."""
    positions = np.arange(len(curve), dtype=np.float64)
    centred = positions - positions.mean()
    return float(centred @ np.asarray(curve, dtype=np.float64) / (centred @ centred))


def _mean(values: Curve) -> float:
    return float(np.mean(values, dtype=np.float64))
