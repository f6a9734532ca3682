"""Where texts part, and how many are still the same when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_quantkit.long_generation.divergence import diverge, first_difference, survive
from vllm_quantkit.long_generation.intervals import ratio_of_means, share

texts = st.lists(st.integers(0, 2), max_size=8)


def test_positions_count_from_one():
    assert first_difference([5, 6, 7], [5, 6, 8]) == 3
    assert first_difference([4, 6], [5, 6]) == 1
    assert first_difference([5, 6], [5, 6]) is None
    # One that was cut off earlier differs nowhere: what would have come is not known.
    assert first_difference([5, 6], [5, 6, 7]) is None


@given(texts, texts)
def test_all_before_the_position_is_the_same_and_it_is_not(first, second):
    at = first_difference(first, second)

    same = len(list(zip(first, second, strict=False))) if at is None else at - 1
    assert first[:same] == second[:same]
    assert at is None or first[at - 1] != second[at - 1]


def test_survival_is_the_estimate_of_kaplan_and_meier():
    # Five texts: one parts at 2, one ends unparted at 3, two part at 5, one stays to 9. By hand,
    # S(2) = 4/5; at 5 three are left of which two part, so S(5) = 4/5 * 1/3.
    steps = survive([2, None, 5, 5, None], [9, 3, 9, 9, 9])

    assert [step.position for step in steps] == [2, 5]
    assert [step.share for step in steps] == pytest.approx([4 / 5, 4 / 15])


def test_without_texts_that_end_early_survival_is_a_count():
    steps = survive([3, 1, None, 3], [8, 8, 8, 8])

    assert [(step.position, step.share) for step in steps] == [(1, 0.75), (3, pytest.approx(0.25))]


def test_what_two_models_texts_come_to():
    first = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3]]
    second = [[1, 2, 3, 4], [1, 9, 3, 4], [1, 2, 9, 9], [1, 2, 9]]

    found = diverge(first, second)

    assert found.positions == (None, 2, 3, 3)
    assert found.lengths == (4, 4, 4, 3)
    assert found.median == 3
    assert found.never.value == 0.25
    assert found.survival[-1].share == pytest.approx(0.25)


def test_there_is_no_median_while_most_are_the_same():
    assert diverge([[1], [1], [1]], [[1], [1], [2]]).median is None
    assert diverge([[1], [1]], [[1], [1]]).survival == ()


def test_texts_of_other_prompts_cannot_be_compared():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        diverge([[1]], [[1], [2]])


def test_the_interval_of_a_share_is_wilsons():
    # By hand for 1 of 4 with z = 1.959964: centre (0.25 + 0.480182) / 1.960365 = 0.372472,
    # reach 1.959964 / 1.960365 * sqrt(0.046875 + 0.060023) = 0.326887.
    found = share(1, 4)

    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.04559, 0.69936), abs=1e-4)
    assert share(0, 5).low == 0
    assert share(5, 5).high == 1


def test_the_interval_of_a_ratio_leaves_out_a_prompt_at_a_time():
    # 6 / 3; without each pair 5/2 or 1/1 of (1, 1) and (5, 2): logs 0.916291 and 0, whose
    # jackknife error is 0.458145, times Student's 12.7062 with one degree of freedom.
    found = ratio_of_means([1, 5], [1, 2])

    assert found.value == 2
    assert found.low == pytest.approx(2 * 2.71828182846 ** (-12.7062 * 0.458145), rel=1e-3)
    assert found.high == pytest.approx(2 * 2.71828182846 ** (12.7062 * 0.458145), rel=1e-3)


def test_a_ratio_with_nothing_below_is_no_number():
    assert str(ratio_of_means([1, 2], [0, 0]).value) == "nan"
    assert str(ratio_of_means([0, 0], [1, 2]).value) == "nan"
    only_one = ratio_of_means([1, 0], [1, 1])
    assert only_one.value == 0.5
    assert str(only_one.low) == "nan"


def test_equal_ratios_leave_no_doubt():
    found = ratio_of_means([3, 6, 9], [1, 2, 3])

    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))
