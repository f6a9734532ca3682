"""Engines that answer at once, at speeds that a test sets."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from vllm_quantkit.bench.plan import SHORT_PROMPT, BenchPlan
from vllm_quantkit.engine import EngineError, EngineSpec
from vllm_quantkit.terminal import Terminal

PLAN = BenchPlan(batches=(1, 4), tokens=8, prompts=(80,), load=2, mixed=4, rounds=5)
DEAD = "the engine stopped; engine.log ends:\nRuntimeError: out of memory"


class FakeEngine:
    """Decodes `rate` tokens/s a sequence; fails at `dies_at`, the `after`-th time it is asked.

    `wobble` gives the factor on its rate, by the number of the question.
    """

    def __init__(
        self,
        rate: float,
        dies_at: str = "",
        after: int = 1,
        perplexity: float = 10.0,
        wobble: Callable[[int], float] = lambda number: 1.0,
    ) -> None:
        self.rate, self.dies_at, self.after = rate, dies_at, after
        self.perplexity, self.wobble = perplexity, wobble
        self.asked: list[str] = []
        self.closed = False
        self._number = count()

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        self.asked.append(op)
        if op == self.dies_at and self.asked.count(op) >= self.after:
            raise EngineError(DEAD)
        rate = self.rate * self.wobble(next(self._number))
        answer: dict[str, Any] = getattr(self, f"_{op}")(rate, **request)
        return answer

    def _perplexity(self, rate: float, text: str, max_tokens: int) -> dict[str, Any]:
        return {"perplexity": self.perplexity, "tokens": len(text)}

    def _decode(self, rate: float, batch: int, tokens: int, context: int) -> dict[str, Any]:
        assert context == SHORT_PROMPT
        return {"tokens_per_second": batch * rate, "gap": 1 / rate, "gap_tail": 2 / rate}

    def _prefill(self, rate: float, tokens: int) -> dict[str, Any]:
        return {"short": 0.5, "full": 0.5 + (tokens - SHORT_PROMPT) / (10 * rate)}

    def _first_token_under_load(self, rate: float, tokens: int, load: int) -> dict[str, Any]:
        return {"seconds": (tokens + load) / rate}

    def _mixed(self, rate: float, requests: int, prompt: int, tokens: int) -> dict[str, Any]:
        return {"tokens_per_second": requests * rate}

    def _memory(self, rate: float) -> dict[str, Any]:
        return {"ranks": [{"weights": 1 << 20}, {"weights": 3 << 20}], "cache": {"tokens": 4096}}

    def _peak(self, rate: float) -> dict[str, Any]:
        return {"bytes": 5 << 20}

    def _calibrate(self, rate: float) -> dict[str, Any]:
        return {"seconds": 0.1}

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closed = True


class Starter:
    """Starts fakes instead of engines, by the name of the model."""

    def __init__(self, make: dict[str, Callable[[], FakeEngine]]) -> None:
        self.make = make
        self.started: list[tuple[str, FakeEngine]] = []

    def __call__(self, spec: EngineSpec, log: Path) -> FakeEngine:
        assert all(engine.closed for _, engine in self.started) or self.may_overlap
        engine = self.make[spec.model]()
        self.started.append((spec.model, engine))
        return engine

    may_overlap = True

    @property
    def order(self) -> list[str]:
        return [name for name, _ in self.started]


def refusing() -> FakeEngine:
    raise EngineError("it stopped:\nValueError: no such kernel")


def specs(*models: str) -> dict[str, EngineSpec]:
    return {model: EngineSpec(model) for model in models}


@contextmanager
def captured(**how: bool) -> Iterator[tuple[Terminal, io.StringIO, io.StringIO]]:
    """A terminal, what it prints as the result, and what aside."""
    out, aside = io.StringIO(), io.StringIO()

    def console(file: io.StringIO) -> Console:
        return Console(file=file, highlight=False, soft_wrap=True, markup=False)

    yield Terminal(**how, out=console(out), aside=console(aside)), out, aside
