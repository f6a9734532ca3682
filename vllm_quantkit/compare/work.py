"""What is done for a row, whoever does it: engines, or tests that pretend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from vllm_quantkit.compare.result import Facts, Step, Timing
from vllm_quantkit.compare.rows import Row
from vllm_quantkit.compare.store import Key
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.evaluate.quality import Perplexity, Quality
from vllm_quantkit.evaluate.tasks import TaskScore
from vllm_quantkit.spec import Frozen


@dataclass(frozen=True)
class Served:
    """A row that can be served.

    Attributes:
        spec: its engine.
        identity: all that decides what the engine computes, wherever its files lie.
        seconds: that making its checkpoint took; None where none was made.
    """

    spec: EngineSpec
    identity: Key
    seconds: float | None = None


class Scores(Frozen):
    """What a row scores in each task."""

    scores: tuple[TaskScore, ...]


@dataclass(frozen=True)
class SpeedRun:
    """What came of timing rows in turns.

    Attributes:
        timings: by name of the row.
        failures: name of a row to why it has none.
    """

    timings: Mapping[str, Timing]
    failures: Mapping[str, str]


class Workbench(Protocol):
    """What does the work; keys say what decides a result, so that it is measured once."""

    def check(self, steps: frozenset[Step]) -> None:
        """That steps can be done at all, before anything is made."""

    def serve(self, row: Row) -> Served:
        """The row's engine; its checkpoint is made or found."""

    def facts(self, served: Served) -> Facts:
        """By the headers of its files."""

    def quality_key(self, served: Served) -> Key:
        """Of `quality` and `base_quality`."""

    def open_base(self, base: Served) -> None:
        """The 16-bit model's log-probabilities, which `quality` compares with."""

    def quality(self, served: Served) -> Quality:
        """Beside the 16-bit model."""

    def base_quality(self, base: Served) -> Perplexity:
        """The 16-bit model alone."""

    def tasks_key(self, served: Served) -> Key:
        """Of `tasks`."""

    def tasks(self, name: str, served: Served, base: Scores | None) -> Scores:
        """Scores of the row called `name`, and drops from the 16-bit model's where there are."""

    def speed_key(self, served: Served) -> Key:
        """Of `speeds`."""

    def speeds(self, rows: Mapping[str, Served]) -> Iterator[SpeedRun]:
        """All of them in turns with the first, the 16-bit model; in parts if need be."""
