"""Speeds of rows, whose engines take turns with the 16-bit model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_quantkit.bench.fitting import Fit, fit
from vllm_quantkit.bench.gate import Gate, gate_text
from vllm_quantkit.bench.noise import Noise, load_average
from vllm_quantkit.bench.offline import OfflineBench, Start
from vllm_quantkit.bench.requests import BenchRequest
from vllm_quantkit.bench.results import entries
from vllm_quantkit.compare.result import Timing
from vllm_quantkit.compare.work import Served, SpeedRun
from vllm_quantkit.engine import Engine, EngineSpec
from vllm_quantkit.hardware import find_device
from vllm_quantkit.terminal import Terminal


@dataclass(frozen=True)
class Stopwatch:
    """Times rows as `quantkit bench` does.

    Attributes:
        request: what is asked, how often, and how engines are started.
        logs: folder of the engines' logs.
        terminal: where progress is shown.
        start: starts an engine.
    """

    request: BenchRequest
    logs: Path
    terminal: Terminal
    start: Start = Engine

    def time(self, rows: Mapping[str, Served]) -> Iterator[SpeedRun]:
        """All rows in turns with the first, the 16-bit model: as many at a time as fit.

        Raises:
            QuantkitError: nothing could be started.
        """
        specs = {name: self._spec(served.spec) for name, served in rows.items()}
        for group in self.groups(specs):
            yield self._time_together({name: specs[name] for name in group})

    def groups(self, specs: Mapping[str, EngineSpec]) -> list[list[str]]:
        """Names of engines that fit into memory together, the 16-bit model's among each.

        Where not even two of them do, they run one at a time.
        """
        base, *others = specs
        fits = self._fit(specs).together
        if fits or len(others) < 2 or self.request.together is not None:
            return [[base, *others]]
        middle = (len(others) + 1) // 2
        halves = ([base, *others[:middle]], [base, *others[middle:]])
        return [group for half in halves for group in self.groups({n: specs[n] for n in half})]

    def _fit(self, specs: Mapping[str, EngineSpec]) -> Fit:
        return fit(specs, self.request.plan, find_device(None), self.request.together)

    def _time_together(self, specs: Mapping[str, EngineSpec]) -> SpeedRun:
        chosen = self._fit(specs)
        how = "in turns" if chosen.together else "one at a time"
        self.terminal.note(f"speed: {', '.join(specs)} {how} ...")
        specs = {name: chosen.apply(spec) for name, spec in specs.items()}
        gate = Gate(text=gate_text(self.request.text), tolerance=self.request.gate)
        bench = OfflineBench(specs, self.request.plan, gate, self.logs, self.terminal, self.start)
        load = load_average()
        if chosen.together:
            bench.run_together()
        else:
            bench.run_one_at_a_time()
        return self._outcome(bench, next(iter(specs)), load)

    def _spec(self, spec: EngineSpec) -> EngineSpec:
        """Room for what is asked."""
        plan = self.request.plan
        options = {"max_num_seqs": plan.most_sequences, **dict(spec.options)}
        length = self.request.max_model_len or plan.longest
        return replace(spec, max_model_len=length, options=tuple(options.items()))

    def _outcome(self, bench: OfflineBench, base: str, load: float | None) -> SpeedRun:
        samples, failures = bench.rounds.samples(), dict(bench.rounds.failures)
        if base in failures:
            reason = f"the 16-bit model has no speed to compare with: {failures[base]}"
            return SpeedRun({}, {name: failures.get(name, reason) for name in bench.specs})
        noise = Noise(seconds=tuple(bench.rounds.seconds), load=load).warnings()
        timings = {
            name: Timing(
                entries=entries(samples[name], None if name == base else samples[base]),
                weight_bytes=memory.weight_bytes,
                cache_tokens=memory.cache_tokens,
                doubts=noise,
            )
            for name, memory in bench.memory.items()
            if name not in failures
        }
        return SpeedRun(timings, failures)
