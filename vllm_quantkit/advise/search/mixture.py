"""The mixture of least divergence within a budget of memory or time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_quantkit.advise.search.knapsack import Choice, Option, choose
from vllm_quantkit.advise.search.units import Unit, UnitOption
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.spec import Frozen

Cost = Callable[[Unit, UnitOption], int]
"""What an option of a unit takes of the budget, in whole numbers."""


@dataclass(frozen=True)
class Budget:
    """A limit of the sum over all units.

    Attributes:
        cost: of an option.
        limit: of the sum of costs.
        words: what it limits.
    """

    cost: Cost
    limit: int
    words: str


class Pure(Frozen):
    """The whole model quantised in one way, as far as it was measured for every layer.

    Attributes:
        way: its name.
        nbytes: of the linear layers' tensors.
        loss: sum of its layers' KL divergences.
        fits: whether it is within the budget.
    """

    way: str
    nbytes: int
    loss: float
    fits: bool


@dataclass(frozen=True)
class Mixture:
    """One option for each unit.

    Attributes:
        taken: in the order of the model.
        choice: sums, and how far they may be from the best.
    """

    taken: tuple[tuple[Unit, UnitOption], ...]
    choice: Choice

    @property
    def nbytes(self) -> int:
        """Of the linear layers' tensors in the checkpoint."""
        return sum(option.nbytes for _, option in self.taken)


def best_mixture(units: Sequence[Unit], budget: Budget) -> Mixture:
    """The options of least total KL divergence within the budget.

    Raises:
        ConfigError: even the cheapest options do not fit.
    """
    table = [
        [Option(budget.cost(unit, option), option.loss) for option in unit.options]
        for unit in units
    ]
    choice = choose(table, budget.limit)
    if choice is None:
        least = sum(min(option.cost for option in options) for options in table)
        raise ConfigError(
            f"{budget.words}: nothing that was measured fits, the cheapest mixture takes "
            f"{least / max(budget.limit, 1):.2f} times what is left for the layers. Raise the "
            "budget, or measure ways of fewer bits."
        )
    taken = tuple(
        (unit, unit.options[index]) for unit, index in zip(units, choice.options, strict=True)
    )
    return Mixture(taken, choice)


def pure_ways(units: Sequence[Unit], budget: Budget) -> tuple[Pure, ...]:
    """The ways that every unit has, the whole model in each."""
    names = [option.way for option in units[0].options]
    found = []
    for name in names:
        taken = [(unit, option) for unit in units for option in unit.options if option.way == name]
        if len(taken) == len(units):
            found.append(
                Pure(
                    way=name,
                    nbytes=sum(option.nbytes for _, option in taken),
                    loss=sum(option.loss for _, option in taken),
                    fits=sum(budget.cost(*one) for one in taken) <= budget.limit,
                )
            )
    return tuple(found)
