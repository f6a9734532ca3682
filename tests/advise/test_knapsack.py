"""The options of least loss within a budget, beside trying them all."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_quantkit.advise.search import knapsack
from vllm_quantkit.advise.search.knapsack import Choice, Option, choose, lower_bound

COST = st.integers(0, 300)
LOSS = st.floats(0, 10, allow_nan=False)
UNITS = st.lists(
    st.lists(st.builds(Option, COST, LOSS), min_size=1, max_size=4), min_size=1, max_size=5
)


def brute_force(units: list[list[Option]], budget: int) -> float | None:
    fitting = [
        sum(option.loss for option in picked)
        for picked in itertools.product(*units)
        if sum(option.cost for option in picked) <= budget
    ]
    return min(fitting, default=None)


def check(choice: Choice, units: list[list[Option]], budget: int) -> None:
    picked = [unit[index] for unit, index in zip(units, choice.options, strict=True)]
    assert choice.cost == sum(option.cost for option in picked) <= budget
    assert choice.loss == pytest.approx(sum(option.loss for option in picked))


@given(UNITS, st.integers(0, 1200))
def test_small_cases_are_solved_exactly(units: list[list[Option]], budget: int) -> None:
    expected, choice = brute_force(units, budget), choose(units, budget)
    assert (choice is None) == (expected is None)
    if choice is not None:
        check(choice, units, budget)
        # Sums of at most five losses in another order.
        assert choice.loss == pytest.approx(expected, abs=1e-9)
        assert choice.gap == 0


@given(UNITS, st.integers(0, 1200))
def test_nothing_that_fits_is_below_the_bound(units: list[list[Option]], budget: int) -> None:
    expected = brute_force(units, budget)
    if expected is not None:
        # Bisection stops at the spacing of doubles; prices go up to 4 * loss / cost.
        assert lower_bound(units, budget) <= expected + 1e-6


@settings(max_examples=30)
@given(UNITS, st.lists(st.integers(0, 1200), min_size=2, max_size=6))
def test_a_larger_budget_never_gives_a_larger_loss(
    units: list[list[Option]], budgets: list[int]
) -> None:
    losses = [
        math.inf if (choice := choose(units, budget)) is None else choice.loss
        for budget in sorted(budgets)
    ]
    assert all(more <= less + 1e-9 for less, more in itertools.pairwise(losses))


@given(units=UNITS, budget=st.integers(0, 1200))
def test_rounded_costs_still_fit_and_the_gap_is_true(
    units: list[list[Option]], budget: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "STEPS", 7)
        choice = choose(units, budget)
    expected = brute_force(units, budget)
    if choice is not None and expected is not None:
        check(choice, units, budget)
        assert choice.loss - choice.gap <= expected + 1e-6


def test_a_model_of_many_layers_takes_its_bound() -> None:
    """126 blocks of four layers: the gap is small, because one layer is a small part of all."""
    units = [
        [
            Option(16 * size + 1, 0.0),
            Option(8 * size, 1e-4 * (1 + block % 7)),
            Option(4 * size + 3, 3e-3 * (1 + (block * shape) % 5)),
        ]
        for block in range(126)
        for shape, size in enumerate((48_000_001, 16_000_003, 240_000_011, 120_000_007))
    ]
    budget = sum(6 * unit[1].cost // 8 for unit in units)
    choice = choose(units, budget)
    assert choice is not None
    assert choice.cost <= budget
    assert choice.gap < 0.01 * choice.loss


def test_what_does_not_fit_is_not_chosen() -> None:
    assert choose([[Option(5, 0.0), Option(3, 1.0)], [Option(4, 0.0)]], 6) is None
