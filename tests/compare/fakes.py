"""A comparison without engines: every result is made up, and every call is counted."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_quantkit.bench.results import Entry
from vllm_quantkit.bench.samples import Sample, speed_up
from vllm_quantkit.compare.result import Bits, Facts, Step, Timing
from vllm_quantkit.compare.rows import Row
from vllm_quantkit.compare.store import Key, Store
from vllm_quantkit.compare.work import Scores, Served, SpeedRun
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.evaluate.intervals import Interval
from vllm_quantkit.evaluate.quality import Perplexity, Quality
from vllm_quantkit.evaluate.tasks import TaskScore
from vllm_quantkit.terminal import Terminal

SPEEDS = {"16-bit": 1.0, "fp8": 1.5, "awq": 2.5, "awq+kv4": 2.0}
"""Row to how many times as fast as 16 bits it pretends to be."""


def quiet_terminal() -> tuple[Terminal, io.StringIO]:
    """A terminal, and what it says aside."""
    aside = io.StringIO()
    consoles = {
        name: Console(file=stream, width=300, highlight=False, markup=False, soft_wrap=True)
        for name, stream in (("out", io.StringIO()), ("aside", aside))
    }
    return Terminal(**consoles), aside


def make_store(folder: Path) -> tuple[Store, io.StringIO]:
    """A store, and what it says aside."""
    terminal, aside = quiet_terminal()
    folder.mkdir(exist_ok=True)
    return Store(folder, terminal), aside


class Killed(BaseException):
    """What no code catches."""


@dataclass
class FakeWorkbench:
    """Counts what it is asked; may fail, or be killed after so many calls.

    Attributes:
        failing: names of calls to the sentence that they fail with.
        kill_after: calls until it is killed; None for never.
        version: changes every key.
        together: rows that are timed at once beside the 16-bit model.
        calls: name of a call to how often it was made.
    """

    failing: dict[str, str] = field(default_factory=dict)
    kill_after: int | None = None
    version: str = "1"
    together: int = 7
    calls: Counter[str] = field(default_factory=Counter)
    done: int = 0

    def check(self, steps: frozenset[Step]) -> None:
        if "check" in self.failing:
            raise QuantkitError(self.failing["check"])

    def serve(self, row: Row) -> Served:
        self._called(f"serve {row.name}")
        spec = EngineSpec(f"models/{row.name}", None if row.is_base else "quantkit")
        return Served(spec, {"row": row.name}, 12.0 if row.is_made else None)

    def facts(self, served: Served) -> Facts:
        width = 16 if served.spec.quantization is None else 4
        size = width << 16
        return Facts(
            bits=Bits(weights=(width,), activations=(16,), kv=(16,)),
            weight_bytes=size,
            weight_bytes_16bit=1 << 20,
            kv_bytes_per_token=1024,
        )

    def quality_key(self, served: Served) -> Key:
        return {**served.identity, "version": self.version}

    def open_base(self, base: Served) -> None:
        self._called("open_base")

    def quality(self, served: Served) -> Quality:
        self._called(f"quality {served.identity['row']}")
        return quality_of(0.02)

    def base_quality(self, base: Served) -> Perplexity:
        self._called("base_quality")
        fields = {name: getattr(quality_of(0), name) for name in Perplexity.model_fields}
        return Perplexity(**fields)

    def tasks_key(self, served: Served) -> Key:
        return {**served.identity, "version": self.version}

    def tasks(self, name: str, served: Served, base: Scores | None) -> Scores:
        self._called(f"tasks {name}")
        drop = None if base is None else interval(0.01)
        score = TaskScore(
            task="quiz", metric="acc,none", score=interval(0.5), drop=drop, results="results.json"
        )
        return Scores(scores=(score,))

    def speed_key(self, served: Served) -> Key:
        return {**served.identity, "version": self.version}

    def speeds(self, rows: Mapping[str, Served]) -> Iterator[SpeedRun]:
        base, *others = rows
        for place in range(0, max(len(others), 1), self.together):
            yield self._time([base, *others[place : place + self.together]])

    def _time(self, names: list[str]) -> SpeedRun:
        self._called(f"speeds {' '.join(names)}")
        asked = {name: f"time {name}" for name in names}
        failed = {n: self.failing[call] for n, call in asked.items() if call in self.failing}
        timings = {name: timing_of(SPEEDS[name]) for name in names if name not in failed}
        return SpeedRun(timings, failed)

    def _called(self, name: str) -> None:
        if self.done == self.kill_after:
            raise Killed
        self.done += 1
        self.calls[name] += 1
        if name in self.failing:
            raise QuantkitError(self.failing[name])


def interval(value: float, reach: float = 0.1) -> Interval:
    return Interval(value=value, low=value * (1 - reach), high=value * (1 + reach))


def quality_of(increase: float, **fields: Any) -> Quality:
    """Made-up figures."""
    known = {
        "tokens": 4088,
        "perplexity": interval(17 * (1 + increase)),
        "base_perplexity": interval(17.0),
        "increase": interval(increase),
        "divergence": interval(increase / 2),
        "divergence_tail": 5 * increase,
        "top1_agreement": interval(0.9, 0.05),
        "backend": "vllm 0.32.0",
        "source": "held_out.txt",
        "windows": 8,
        "length": 512,
    }
    return Quality(**{**known, **fields})


def timing_of(speed: float, rounds: int = 6) -> Timing:
    """Decode and prefill, so many times as fast as 100 and 1000 tokens/s."""
    entries = []
    for quantity, at, base in (("decode", 1, 100.0), ("prefill", 448, 1000.0)):
        theirs = Sample.of(base + place for place in range(rounds))
        ours = Sample.of(speed * value for value in theirs.rounds)
        entries.append(
            Entry(
                quantity=quantity,
                at=at,
                unit="tokens/s",
                better="higher",
                sample=ours,
                ratio=None if speed == 1 else speed_up(ours, theirs, "higher"),
            )
        )
    size = round((1 << 20) / speed)
    return Timing(entries=tuple(entries), weight_bytes=size, cache_tokens=4096)
