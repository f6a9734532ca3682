"""KL along a text: averaged over ranges, and late beside early."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from vllm_quantkit.long_generation.curve import compounding, kl_curve


def test_ranges_cover_every_position_once():
    for length in (1, 15, 16, 47, 100, 1000, 1001):
        found = kl_curve([[0.5] * length, [0.5] * length])

        assert found[0].first == 1
        assert found[-1].last == length
        assert all(a.last + 1 == b.first for a, b in pairwise(found))
        assert len(found) <= 24


def test_a_range_is_averaged_over_tokens_and_prompts():
    # Two ranges of 16 positions; the means of the second are 4 and 2, so 3, and with one degree of
    # freedom Student's 12.7062 times the standard error 1.
    curves = [[1.0] * 16 + [4.0] * 16, [3.0] * 16 + [2.0] * 16]

    first, second = kl_curve(curves)

    assert (first.first, first.last, first.prompts) == (1, 16, 2)
    assert first.divergence.value == pytest.approx(2)
    assert (second.first, second.last) == (17, 32)
    assert second.divergence.value == pytest.approx(3)
    assert second.divergence.high == pytest.approx(3 + 12.7062, rel=1e-4)
    assert second.divergence.low == 0  # no divergence is negative


def test_shorter_texts_count_as_far_as_they_go():
    # In the second range one text has 16 positions of 1, the other 4 of 6: (16 + 24) / 20.
    first, second = kl_curve([[1.0] * 32, [1.0] * 16 + [6.0] * 4])

    assert first.divergence.value == 1
    assert second.divergence.value == pytest.approx(2)
    assert second.prompts == 2


def test_a_range_that_one_text_reaches_has_no_interval_and_is_left_out():
    found = kl_curve([[1.0] * 32, [1.0] * 10])

    assert [(part.first, part.last) for part in found] == [(1, 16)]


def test_steady_divergence_does_not_compound():
    found = compounding([[0.2] * 40, [0.2] * 40, [0.2] * 40])

    assert found is not None
    assert (found.early, found.late) == pytest.approx((0.2, 0.2))
    assert found.ratio.value == pytest.approx(1)
    assert found.slope.value == pytest.approx(0, abs=1e-12)


def test_growing_divergence_is_found_with_its_slope():
    # KL = 0.1 + 0.002 t: 2 nats per 1,000 tokens; the quarters' means are 0.1 + 0.002 * 4.5 and
    # 0.1 + 0.002 * 34.5.
    line = [0.1 + 0.002 * t for t in range(40)]
    found = compounding([line, line])

    assert found is not None
    assert found.slope.value == pytest.approx(2)
    assert (found.early, found.late) == pytest.approx((0.109, 0.169))
    assert found.ratio.value == pytest.approx(0.169 / 0.109)
    assert found.ratio.low > 1


def test_intervals_hold_the_truth_as_often_as_they_say():
    # 400 experiments of 6 prompts whose KL doubles along the text: 95 % of the intervals of late /
    # early should hold 2. Binomially, 400 give 95 % -+ 2.1 %; the jackknife of a logarithm over 6
    # prompts may be off by a few more, so anything from 90 % on is called right.
    drawn = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        level = drawn.gamma(4.0, 0.01, size=(6, 1))
        curves = level * np.repeat([1.0, 1.5, 1.5, 2.0], 8) * drawn.gamma(2.0, 0.5, size=(6, 32))
        found = compounding(list(curves))
        assert found is not None
        held += found.ratio.low <= 2 <= found.ratio.high

    assert 0.90 <= held / 400 <= 0.99


def test_texts_too_short_for_quarters_say_nothing():
    assert compounding([[1.0] * 3, [1.0] * 30]) is None


def test_models_that_agree_have_no_ratio():
    found = compounding([[0.0] * 8, [0.0] * 8])

    assert found is not None
    assert math.isnan(found.ratio.value)
    assert found.slope.value == 0
