"""Intervals cover what they promise, on data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_quantkit.evaluate.intervals import Interval, mean_interval, student_quantile

TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 11: 2.201, 31: 2.040, 1000: 1.962}
"""Student's 97.5 % quantiles as tables print them."""

TRIALS = 2000

COVERED = (0.92, 0.965)
"""Share of intervals of 95 % that hold the truth: +- 3 standard errors of TRIALS draws, 0.005 each,
and on the low side as much again, since few windows of a skewed figure cover a little less."""


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_tables(freedom: int) -> None:
    tolerance = 0.01 if freedom == 3 else 2e-3  # what the expansion promises
    assert student_quantile(0.975, freedom) == pytest.approx(TABLE[freedom], rel=tolerance)


def test_an_interval_is_the_definition() -> None:
    found = mean_interval([2.0, 6.0], [2, 2])
    # Means 1 and 3: standard error 1, and 12.706 of them at one degree of freedom.
    assert found.value == 2.0
    assert found.high - found.value == pytest.approx(12.706, rel=1e-4)
    assert found.value - found.low == pytest.approx(12.706, rel=1e-4)


def test_windows_count_by_their_tokens() -> None:
    assert mean_interval([1.0, 30.0], [1, 10]).value == pytest.approx(31 / 11)


def test_windows_that_agree_leave_no_doubt() -> None:
    assert mean_interval([3.0, 6.0, 9.0], [1, 2, 3]) == Interval(value=3.0, low=3.0, high=3.0)


def test_an_infinite_mean_has_no_width() -> None:
    assert mean_interval([math.inf, 1.0], [2, 2]).low == math.inf


@pytest.mark.parametrize("windows", [6, 12, 32])
def test_intervals_cover_the_truth(windows: int) -> None:
    """Log-normal losses with an effect of each window: tokens of one window are not independent."""
    random = np.random.default_rng(windows)
    truth = math.exp(0.3**2 / 2 + 1.0**2 / 2)
    covered = 0
    for _ in range(TRIALS):
        effects = random.normal(0, 0.3, (windows, 1))
        tokens = np.exp(effects + random.normal(0, 1.0, (windows, 200)))
        found = mean_interval(tokens.sum(1).tolist(), [200] * windows)
        covered += found.low <= truth <= found.high
    assert COVERED[0] <= covered / TRIALS <= COVERED[1]


def test_tokens_taken_for_independent_would_not_cover_it() -> None:
    """What the interval over windows is for: the same draws, each token a window of its own."""
    random = np.random.default_rng(0)
    truth, covered = math.exp(0.3**2 / 2 + 1.0**2 / 2), 0
    for _ in range(100):
        tokens = np.exp(random.normal(0, 0.3, (12, 1)) + random.normal(0, 1.0, (12, 200)))
        found = mean_interval(tokens.flatten().tolist(), [1] * tokens.size)
        covered += found.low <= truth <= found.high
    assert covered < 80


def test_a_paired_difference_is_surer_than_two_levels() -> None:
    """Windows differ far more in difficulty than in what quantising costs them."""
    random = np.random.default_rng(0)
    base = random.normal(3.0, 0.5, 12) * 100
    change = random.normal(0.02, 0.005, 12) * 100
    paired = mean_interval(change.tolist(), [100] * 12)
    level = mean_interval((base + change).tolist(), [100] * 12)
    assert (paired.high - paired.low) < (level.high - level.low) / 20


def test_intervals_stay_within_what_is_possible() -> None:
    assert Interval(value=0.1, low=-0.2, high=0.4).within(0, math.inf).low == 0
    assert Interval(value=0.99, low=0.97, high=1.01).within(0, 1).high == 1
