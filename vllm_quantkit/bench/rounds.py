"""Rounds in which what is compared takes turns: A B C, then C B A, and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from vllm_quantkit.bench.quantities import Key
from vllm_quantkit.bench.samples import Sample
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.terminal import Terminal, Tick

Subject_contra = TypeVar("Subject_contra", contravariant=True)
Compared = TypeVar("Compared")


class Measure(Protocol[Subject_contra]):
    """One thing that is asked of everything compared."""

    def ask(self, subject: Subject_contra) -> Mapping[Key, float]:
        """What was measured just now.

        Raises:
            QuantkitError: nothing could be.
        """


Calibrate = Callable[["Rounds[Compared]", Mapping[str, Compared]], float | None]
"""Seconds of fixed work; None where nothing is left that could do it."""


@dataclass
class Rounds(Generic[Compared]):
    """What rounds have measured so far.

    Attributes:
        measures: what is asked in each round.
        calibrate: times fixed work before every measure.
        values: label to quantity to the value of each round.
        failures: label to why it is asked no more.
        seconds: what `calibrate` gave.
    """

    measures: Sequence[Measure[Compared]]
    calibrate: Calibrate[Compared]
    values: dict[str, dict[Key, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def warm_up(self, subjects: Mapping[str, Compared], tick: Tick) -> None:
        """Ask everything once and forget the answers: first runs compile and fill caches."""
        for measure in self.measures:
            for label in self.alive(subjects):
                self._ask(measure, label, subjects[label])
                tick()

    def take(self, number: int, subjects: Mapping[str, Compared], tick: Tick) -> None:
        """Round `number`: each measure of each subject, in an order that turns every round."""
        for measure in self.measures:
            if (seconds := self.calibrate(self, subjects)) is not None:
                self.seconds.append(seconds)
            for label in turns(self.alive(subjects), number):
                for key, value in self._ask(measure, label, subjects[label]).items():
                    self.values.setdefault(label, {}).setdefault(key, []).append(value)
                tick()

    def alive(self, labels: Iterable[str]) -> list[str]:
        """Those of the labels that have not failed."""
        return [label for label in labels if label not in self.failures]

    def fail(self, label: str, error: QuantkitError) -> None:
        """Ask `label` no more; what it did so far is dropped."""
        self.failures[label] = str(error)
        self.values.pop(label, None)

    def samples(self) -> dict[str, dict[Key, Sample]]:
        """Of everything that did not fail."""
        return {
            label: {key: Sample.of(values) for key, values in found.items()}
            for label, found in self.values.items()
        }

    def _ask(
        self, measure: Measure[Compared], label: str, subject: Compared
    ) -> Mapping[Key, float]:
        try:
            return measure.ask(subject)
        except QuantkitError as error:
            self.fail(label, error)
            return {}


def run_rounds(
    rounds: Rounds[Compared], subjects: Mapping[str, Compared], number: int, terminal: Terminal
) -> None:
    """A warm-up, and then so many rounds of subjects that all run already."""
    steps = len(rounds.measures) * len(rounds.alive(subjects))
    with terminal.phase("warming up", steps) as tick:
        rounds.warm_up(subjects, tick)
    with terminal.phase(f"timing, {count_rounds(number)}", steps * number) as tick:
        for i in range(number):
            rounds.take(i, subjects, tick)


def count_rounds(number: int) -> str:
    """In words."""
    return "1 round" if number == 1 else f"{number} rounds"


def turns(labels: Sequence[str], number: int) -> list[str]:
    """The order of a round: forwards in even ones, backwards in odd ones.

    What drifts during a round then favours nobody.
    """
    return list(labels) if number % 2 == 0 else list(reversed(labels))
