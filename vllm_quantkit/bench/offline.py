"""Speeds in real engines, of a model served in several ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_quantkit.bench.gate import Gate, check_all
from vllm_quantkit.bench.measures import Asked, measures
from vllm_quantkit.bench.memory import Memory, measure_memory
from vllm_quantkit.bench.noise import Noise
from vllm_quantkit.bench.plan import BenchPlan
from vllm_quantkit.bench.results import BenchResult, Row, rows_of
from vllm_quantkit.bench.rounds import Rounds, run_rounds, turns
from vllm_quantkit.bench.speeds import calibrate
from vllm_quantkit.engine.client import Engine, EngineSpec
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.hardware.machine import describe_machine
from vllm_quantkit.terminal import Terminal

Start = Callable[[EngineSpec, Path], Engine]


@dataclass
class OfflineBench:
    """Engines that are started, checked and timed.

    Attributes:
        specs: label to engine; the first is the baseline, or the first that runs.
        plan: what is asked.
        gate: what is checked before.
        logs: folder of the engines' logs.
        terminal: where progress is shown.
        start: starts an engine.
        rounds: what was measured, and which engines failed.
        perplexities: of every engine that answered.
        memory: of every engine that was measured to the end.
    """

    specs: Mapping[str, EngineSpec]
    plan: BenchPlan
    gate: Gate
    logs: Path
    terminal: Terminal
    start: Start = Engine
    perplexities: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rounds: Rounds[Asked] = Rounds(measures(self.plan), calibrate)

    @property
    def base(self) -> str | None:
        """The first engine that answered correctly; None where none did."""
        return next((label for label in self.specs if label in self.perplexities), None)

    def run_together(self) -> None:
        """All engines at the same time; each round asks one after the other."""
        with self._engines(list(self.specs)) as engines:
            self._check(engines)
            run_rounds(self.rounds, engines, self.plan.rounds, self.terminal)
            self._look_at_memory(engines)

    def run_one_at_a_time(self) -> None:
        """A fresh engine for every turn of every round."""
        steps = len(self.rounds.measures)
        for number in range(self.plan.rounds):
            for label in turns(self.rounds.alive(self.specs), number):
                with self._engines([label]) as engines:
                    if number == 0:
                        self._check(engines)
                    name = f"round {number + 1} of {self.plan.rounds}, {label}"
                    with self.terminal.phase(name, 2 * steps) as tick:
                        self.rounds.warm_up(engines, tick)
                        self.rounds.take(number, engines, tick)
                    self._look_at_memory(engines)

    def result(self, load: float | None, **conditions: object) -> BenchResult:
        """What was found.

        Args:
            load: of the machine before the start.
            conditions: how engines were asked, besides the plan.
        """
        return BenchResult(
            machine=describe_machine(),
            base=next(iter(self.rounds.alive(self.specs)), None),
            rounds=self.plan.rounds,
            conditions={
                **self.plan.model_dump(exclude={"rounds"}),
                "gate": self.gate.tolerance,
                **conditions,
            },
            rows=tuple(self._row(row) for row in rows_of(self.rounds, self._served())),
            noise=Noise(seconds=tuple(self.rounds.seconds), load=load),
        )

    def _served(self) -> dict[str, dict[str, Any]]:
        """How each scheme is served."""
        return {
            label: {
                "model": spec.model,
                "quantization": spec.quantization,
                "max_model_len": spec.max_model_len,
                **dict(spec.options),
            }
            for label, spec in self.specs.items()
        }

    def _row(self, row: Row) -> Row:
        """With what is known of engines besides their speeds."""
        memory = self.memory.get(row.label)
        known = {} if memory is None else memory.model_dump()
        return row.model_copy(update={"perplexity": self.perplexities.get(row.label), **known})

    @contextmanager
    def _engines(self, labels: list[str]) -> Iterator[dict[str, Engine]]:
        """Those of the engines that start; for the others, the reason is kept."""
        with ExitStack() as stack:
            engines: dict[str, Engine] = {}
            with self.terminal.phase(f"starting {', '.join(labels)}", len(labels)) as tick:
                for label in labels:
                    try:
                        engine = self.start(self.specs[label], self.logs / f"{_file(label)}.log")
                        engines[label] = stack.enter_context(engine)
                    except QuantkitError as error:
                        self.rounds.fail(label, error)
                    tick()
            yield engines

    def _check(self, engines: Mapping[str, Asked]) -> None:
        """Engines whose perplexity is not near the baseline's are asked nothing more."""
        for label in self.rounds.alive(engines):
            try:
                self.perplexities[label] = self.gate.measure(engines[label])
            except QuantkitError as error:
                self.rounds.fail(label, error)
        if self.base is not None:
            for label, why in check_all(self.gate, self.perplexities, self.base).items():
                self.rounds.fail(label, why)

    def _look_at_memory(self, engines: Mapping[str, Asked]) -> None:
        for label in self.rounds.alive(engines):
            try:
                self.memory[label] = measure_memory(engines[label])
            except QuantkitError as error:
                self.rounds.fail(label, error)


def _file(label: str) -> str:
    """The label as a file's name."""
    return "".join(c if c.isalnum() or c in "-_+." else "-" for c in label)
