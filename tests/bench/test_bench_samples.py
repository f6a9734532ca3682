"""Statistics of rounds, by hand."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from vllm_quantkit.bench.samples import (
    Ratio,
    Sample,
    order_of_interval,
    percentile,
    speed_up,
    spread,
)


def test_a_sample_has_median_range_and_spread():
    sample = Sample.of([10.0, 12.0, 11.0, 50.0])
    assert (sample.median, sample.low, sample.high) == (11.5, 10.0, 50.0)
    assert sample.rounds == (10.0, 12.0, 11.0, 50.0)
    # Distances from 11.5 are 1.5, 0.5, 0.5, 38.5: their median is 1, whatever the largest is.
    assert sample.spread == pytest.approx(1.4826 * 1.0 / 11.5)
    assert sample.noisy


def test_one_outlier_does_not_make_a_sample_noisy():
    assert not Sample.of([100.0, 101.0, 99.0, 100.0, 500.0]).noisy
    assert spread([7.0]) == 0.0


def test_there_is_no_sample_of_nothing():
    with pytest.raises((ValidationError, ValueError)):
        Sample.of([])


@pytest.mark.parametrize(
    ("n", "k", "confidence"),
    [
        (1, 1, 0.0),
        (3, 1, 1 - 2 / 8),
        (5, 1, 1 - 2 / 32),
        (6, 1, 1 - 2 / 64),
        (8, 1, 1 - 2 / 256),
        (9, 2, 1 - 2 * (1 + 9) / 512),
        (20, 6, 1 - 2 * (1 + 20 + 190 + 1140 + 4845 + 15504) / 2**20),
    ],
)
def test_the_interval_is_the_sign_test_s(n, k, confidence):
    """The n = 20 row is the table of a textbook: 6th and 15th, 95.9 %."""
    assert order_of_interval(n) == (k, pytest.approx(confidence))


def test_a_ratio_is_paired_by_round():
    """The machine halves its speed from round to round, and the ratio does not move."""
    base = Sample.of([64.0, 32.0, 16.0, 8.0, 4.0, 2.0])
    ours = Sample.of([2 * x for x in base.rounds])
    ratio = speed_up(ours, base, "higher")
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert ratio.verdict == "faster"
    assert base.noisy


def test_of_times_the_shorter_is_the_faster():
    slow, fast = Sample.of([2.0] * 6), Sample.of([1.0] * 6)
    assert speed_up(fast, slow, "lower").median == 2.0
    assert speed_up(slow, fast, "lower").verdict == "slower"


def test_an_interval_leaves_out_what_the_sign_test_allows():
    base = Sample.of([1.0] * 9)
    ours = Sample.of([0.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 9.0])
    ratio = speed_up(ours, base, "higher")
    assert (ratio.low, ratio.median, ratio.high) == (1.2, 1.5, 1.8)
    assert ratio.confidence == pytest.approx(1 - 20 / 512)


def test_samples_of_different_rounds_are_no_pairs():
    with pytest.raises(ValueError, match="longer"):
        speed_up(Sample.of([1.0]), Sample.of([1.0, 2.0]), "higher")


@pytest.mark.parametrize(
    ("low", "high", "confidence", "verdict"),
    [
        (0.9, 1.1, 0.97, "undecided"),
        (1.01, 1.2, 0.97, "faster"),
        (0.8, 0.99, 0.97, "slower"),
        (0.98, 1.02, 0.97, "alike"),
        (1.5, 1.6, 0.75, "undecided"),
    ],
)
def test_a_verdict_needs_an_interval_without_one(low, high, confidence, verdict):
    ratio = Ratio(median=(low + high) / 2, low=low, high=high, confidence=confidence)
    assert ratio.verdict == verdict


def test_percentiles_are_interpolated():
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 0.5) == 2.5
    assert percentile(values, 0.0) == 1.0
    assert percentile(values, 1.0) == 4.0
    assert percentile(values, 0.99) == pytest.approx(3.97)
