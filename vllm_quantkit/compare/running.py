"""Step after step, row after row: what is kept is not done again, what fails stops no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from pydantic import BaseModel

from vllm_quantkit.compare.result import Facts, Failure, Step, Timing
from vllm_quantkit.compare.rows import Row
from vllm_quantkit.compare.store import Key, Store
from vllm_quantkit.compare.work import Scores, Served, SpeedRun, Workbench
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.evaluate.quality import Perplexity, Quality
from vllm_quantkit.evaluate.tasks import TaskScore

Found = TypeVar("Found")
Kept = TypeVar("Kept", bound=BaseModel)

FAILURES = (QuantkitError, OSError, MemoryError, RuntimeError)
"""That a row may die of while others go on: refusals, files, memory, and PyTorch's own errors."""


@dataclass
class Outcome:
    """What was found of a row so far; None where it was not asked, or failed."""

    row: Row
    served: Served | None = None
    facts: Facts | None = None
    perplexity: Perplexity | None = None
    quality: Quality | None = None
    tasks: tuple[TaskScore, ...] = ()
    timing: Timing | None = None
    failures: list[Failure] = field(default_factory=list)

    def failed(self, step: Step) -> bool:
        """True where the step was tried and did not succeed."""
        return any(failure.step == step for failure in self.failures)

    def fail(self, step: Step, error: BaseException | str) -> None:
        """Notes why there is no figure."""
        self.failures.append(Failure(step=step, reason=_sentence(error)))


@dataclass(frozen=True)
class Runner:
    """Does for every row what was asked for.

    Attributes:
        workbench: does the work.
        store: keeps what it gives.
        steps: that were asked for, besides making and weighing.
    """

    workbench: Workbench
    store: Store
    steps: frozenset[Step]

    def run(self, rows: Sequence[Row]) -> list[Outcome]:
        """All rows, of which the first is the 16-bit model.

        Raises:
            QuantkitError: a step can be done for no row.
        """
        self.workbench.check(self.steps)
        outcomes = [Outcome(row) for row in rows]
        for outcome in outcomes:
            self._make(outcome)
        ready = [(o, o.served) for o in outcomes if o.served is not None]
        if "quality" in self.steps:
            self._quality(ready)
        if "tasks" in self.steps:
            self._tasks(ready)
        if "speed" in self.steps:
            self._speeds(ready)
        return outcomes

    def _make(self, outcome: Outcome) -> None:
        row = outcome.row
        with self._told(row, "checkpoint" if row.is_made or row.kv4 else ""):
            served = self._try(outcome, "checkpoint", partial(self.workbench.serve, row))
        if served is not None:
            outcome.served = served
            outcome.facts = self._try(outcome, "footprint", partial(self.workbench.facts, served))

    def _quality(self, ready: Sequence[tuple[Outcome, Served]]) -> None:
        """Of rows that have none yet; without the 16-bit model, of none."""
        missing = []
        for outcome, served in ready:
            if not outcome.row.is_base:
                key = self.workbench.quality_key(served)
                outcome.quality = self.store.read("quality", outcome.row.name, key, Quality)
                if outcome.quality is None:
                    missing.append((outcome, served))
        if missing and (error := self._open_base(ready)) is not None:
            for outcome, _ in missing:
                outcome.fail("quality", error)
            missing = []
        for outcome, served in missing:
            self._measure_quality(outcome, served)
        for outcome, served in ready:
            outcome.perplexity = outcome.quality
            if outcome.row.is_base:
                outcome.perplexity = self._base_perplexity(outcome, served, ready)

    def _open_base(self, ready: Sequence[tuple[Outcome, Served]]) -> str | None:
        """Why there is nothing to compare with; None where there is."""
        for outcome, served in ready:
            if outcome.row.is_base:
                with self._told(outcome.row, "log-probabilities"):
                    self._try(outcome, "quality", partial(self.workbench.open_base, served))
                if not outcome.failed("quality"):
                    return None
                return f"the 16-bit model could not be measured: {outcome.failures[-1].reason}"
        return "the 16-bit model could not be served, so there is nothing to compare with."

    def _measure_quality(self, outcome: Outcome, served: Served) -> None:
        with self._told(outcome.row, "quality"):
            outcome.quality = self._kept(
                outcome,
                "quality",
                self.workbench.quality_key(served),
                Quality,
                partial(self.workbench.quality, served),
            )

    def _base_perplexity(
        self, base: Outcome, served: Served, ready: Sequence[tuple[Outcome, Served]]
    ) -> Perplexity | None:
        """As the other rows' figures have it, or measured where there are none."""
        for outcome, _ in ready:
            if outcome.quality is not None:
                return base_figures(outcome.quality)
        if base.failed("quality"):
            return None
        key = self.workbench.quality_key(served)
        with self._told(base.row, "quality"):
            return self._kept(
                base, "quality", key, Perplexity, partial(self.workbench.base_quality, served)
            )

    def _tasks(self, ready: Sequence[tuple[Outcome, Served]]) -> None:
        """The 16-bit model's first, which the others' are compared with."""
        base: Scores | None = None
        for outcome, served in ready:
            key = self.workbench.tasks_key(served)
            ask = partial(self.workbench.tasks, outcome.row.name, served, base)
            with self._told(outcome.row, "tasks"):
                found = self._kept(outcome, "tasks", key, Scores, ask)
            outcome.tasks = () if found is None else found.scores
            base = found if outcome.row.is_base else base

    def _speeds(self, ready: Sequence[tuple[Outcome, Served]]) -> None:
        """Of rows that have none yet, in turns with the 16-bit model."""
        missing = {}
        for outcome, served in ready:
            key = self.workbench.speed_key(served)
            outcome.timing = self.store.read("speed", outcome.row.name, key, Timing)
            if outcome.timing is None:
                missing[outcome.row.name] = served
        if not missing:
            return
        base = {o.row.name: served for o, served in ready if o.row.is_base}
        if not base:
            self._fail_all(ready, "the 16-bit model could not be served.")
            return
        try:
            for run in self.workbench.speeds({**base, **missing}):
                self._take(run, ready)
        except FAILURES as error:
            self._fail_all(ready, _sentence(error))

    def _take(self, run: SpeedRun, ready: Sequence[tuple[Outcome, Served]]) -> None:
        """Keeps what came of some rows."""
        for outcome, served in ready:
            name = outcome.row.name
            if name in run.timings:
                outcome.timing = run.timings[name]
                key = self.workbench.speed_key(served)
                self.store.write("speed", name, key, outcome.timing)
            elif name in run.failures and not outcome.failed("speed"):
                outcome.fail("speed", run.failures[name])

    def _fail_all(self, ready: Sequence[tuple[Outcome, Served]], reason: str) -> None:
        for outcome, _ in ready:
            if outcome.timing is None and not outcome.failed("speed"):
                outcome.fail("speed", reason)

    def _kept(
        self,
        outcome: Outcome,
        step: Step,
        key: Key,
        kind: type[Kept],
        measure: Callable[[], Kept],
    ) -> Kept | None:
        """What was kept, or what is measured now and kept from now on."""
        found = self.store.read(step, outcome.row.name, key, kind)
        if found is None and (found := self._try(outcome, step, measure)) is not None:
            self.store.write(step, outcome.row.name, key, found)
        return found

    def _try(self, outcome: Outcome, step: Step, do: Callable[[], Found]) -> Found | None:
        try:
            return do()
        except FAILURES as error:
            outcome.fail(step, error)
            self.store.terminal.warn(f"{outcome.row.title}, {step}: {_sentence(error)}")
            return None

    @contextmanager
    def _told(self, row: Row, what: str) -> Iterator[None]:
        """Says what is done and, where it took a while, how long."""
        if what:
            self.store.terminal.note(f"{row.title}: {what} ...")
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        if what and seconds > 1:
            self.store.terminal.note(f"{row.title}: {what}, {seconds:.0f} s")


def base_figures(quality: Quality) -> Perplexity:
    """The 16-bit model's perplexity, as a quantised one's figures have it."""
    fields = {name: getattr(quality, name) for name in Perplexity.model_fields}
    return Perplexity(**{**fields, "perplexity": quality.base_perplexity, "warnings": ()})


def _sentence(error: BaseException | str) -> str:
    """Why; of the tail of a log that an engine's error may have, the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
