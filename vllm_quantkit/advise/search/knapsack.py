"""min sum_u loss(u, o_u) over sum_u cost(u, o_u) <= budget: one option for each unit.

The multiple-choice knapsack problem. It is solved by dynamic programming over costs: exactly where
they are multiples of a step that leaves at most `STEPS` of them, else with costs rounded up to such
a step, so that the answer always fits; how far it may be from the best is bounded by Lagrangian
duality (Everett, 1963, https://doi.org/10.1287/opre.11.3.399).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

STEPS = 100_000
"""Costs that are told apart. With 200 units of five options each this takes half a second."""

BISECTIONS = 200
"""Of the price of a unit of cost; halves its interval each time, far below double precision."""


@dataclass(frozen=True)
class Option:
    """One way to store a unit.

    Attributes:
        cost: what it takes of the budget, a whole number such as bytes.
        loss: what it adds to the sum that is made small, at least 0.
    """

    cost: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """The options taken.

    Attributes:
        options: index of the option of each unit.
        cost, loss: their sums.
        bound: no choice that fits has a smaller loss than this.
    """

    options: tuple[int, ...]
    cost: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How much smaller the least possible loss may be."""
        return max(0.0, self.loss - self.bound)


def choose(units: Sequence[Sequence[Option]], budget: int) -> Choice | None:
    """The options of least loss within the budget; None where even the cheapest do not fit.

    A larger budget never gives a larger loss: the step does not depend on it.

    Args:
        units: at least one option each.
        budget: of the costs' sum.
    """
    floor = [min(option.cost for option in unit) for unit in units]
    room = budget - sum(floor)
    if room < 0:
        return None
    extra = [
        [option.cost - least for option in unit] for unit, least in zip(units, floor, strict=True)
    ]
    step, exact = _step(extra)
    slots = min(room // step, sum(-(-max(unit) // step) for unit in extra))
    taken = _table(units, extra, step, slots)
    loss = sum(unit[index].loss for unit, index in zip(units, taken, strict=True))
    cost = sum(unit[index].cost for unit, index in zip(units, taken, strict=True))
    return Choice(taken, cost, loss, loss if exact else min(loss, lower_bound(units, budget)))


def lower_bound(units: Sequence[Sequence[Option]], budget: int) -> float:
    """max over p >= 0 of sum_u min_o (loss + p cost) - p budget: below the loss of all that fits.

    The function of the price p is concave, so that the sign of its slope, budget minus the cost of
    what is cheapest at p, says on which side its largest value is.
    """
    low, high = 0.0, 1.0
    while _spent(units, high) > budget and high < 1e30:
        high *= 4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _spent(units, middle) > budget else (low, middle)
    return max(_dual(units, budget, price) for price in (0.0, low, high))


def _step(extra: Sequence[Sequence[int]]) -> tuple[int, bool]:
    """The size of a step of cost, and whether all costs are whole numbers of it."""
    common = gcd(*(cost for unit in extra for cost in unit)) or 1
    total = sum(map(max, extra))
    if total // common <= STEPS:
        return common, True
    return -(-total // STEPS), False


def _table(
    units: Sequence[Sequence[Option]], extra: Sequence[Sequence[int]], step: int, slots: int
) -> tuple[int, ...]:
    """best[c] = the least loss of the units so far at a cost of at most c steps; walked back."""
    best: NDArray[np.float64] = np.zeros(slots + 1)
    taken: list[NDArray[np.int8]] = []
    for unit, costs in zip(units, extra, strict=True):
        rows = np.full((len(unit), slots + 1), np.inf)
        for index, (option, cost) in enumerate(zip(unit, costs, strict=True)):
            steps = -(-cost // step)
            if steps <= slots:
                rows[index, steps:] = best[: slots + 1 - steps] + option.loss
        picked = rows.argmin(axis=0)
        best = rows[picked, np.arange(slots + 1)]
        taken.append(picked.astype(np.int8))
    return _walk_back(taken, extra, step, slots)


def _walk_back(
    taken: Sequence[NDArray[np.int8]], extra: Sequence[Sequence[int]], step: int, slots: int
) -> tuple[int, ...]:
    place, chosen = slots, []
    for picked, costs in zip(reversed(taken), reversed(extra), strict=True):
        index = int(picked[place])
        chosen.append(index)
        place -= -(-costs[index] // step)
    return tuple(reversed(chosen))


def _cheapest(unit: Sequence[Option], price: float) -> Option:
    return min(unit, key=lambda option: (option.loss + price * option.cost, option.cost))


def _spent(units: Sequence[Sequence[Option]], price: float) -> int:
    return sum(_cheapest(unit, price).cost for unit in units)


def _dual(units: Sequence[Sequence[Option]], budget: int, price: float) -> float:
    least = (_cheapest(unit, price) for unit in units)
    return sum(option.loss + price * option.cost for option in least) - price * budget
