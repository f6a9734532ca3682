"""One thing that is known about choosing a scheme: a condition, an effect, a sentence, a source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from vllm_quantkit.advise.situation import Situation, Trial

Effect = Literal["answer", "exclude", "prefer", "warn"]
"""What follows where a rule holds: see `rules`."""

Condition = Callable[[Situation, Trial | None], bool]


@dataclass(frozen=True)
class Rule:
    """One thing that is known.

    Attributes:
        name: unique; also in the answer as JSON.
        effect: what follows where it holds.
        holds: the condition; for `answer` and `warn` the trial is None.
        sentence: said where it holds.
        source: a URL, or a result file of this project.
    """

    name: str
    effect: Effect
    holds: Condition
    sentence: str
    source: str

    def say(self, situation: Situation, trial: Trial | None = None) -> str:
        """The sentence with what it speaks of."""
        return self.sentence.format(s=situation, c=trial)


def holding(
    rules: tuple[Rule, ...], situation: Situation, trial: Trial | None = None
) -> Iterator[Rule]:
    """Those that hold."""
    return (rule for rule in rules if rule.holds(situation, trial))
