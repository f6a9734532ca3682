"""Speeds of engines, measured in rounds in which they take turns."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_quantkit.bench.measures import Asked, measures
from vllm_quantkit.bench.memory import Memory, measure_memory
from vllm_quantkit.bench.noise import Noise
from vllm_quantkit.bench.plan import BenchPlan
from vllm_quantkit.bench.quantities import Key
from vllm_quantkit.bench.rounds import Rounds, run_rounds
from vllm_quantkit.bench.samples import Sample
from vllm_quantkit.engine.client import EngineError
from vllm_quantkit.spec import Frozen
from vllm_quantkit.terminal import Terminal


class Speeds(Frozen):
    """What one engine did.

    Attributes:
        decode: batch to tokens/s of all its sequences together.
        gap: batch to the median time between two tokens of a sequence, seconds.
        gap_tail: batch to the 99th percentile of it within a run, seconds.
        prefill: prompt tokens to tokens/s.
        first: prompt tokens to seconds until the first token, nothing else running.
        first_loaded: the same while `BenchPlan.load` sequences decode.
        mixed: number of requests to tokens/s, of prompts and answers, of a batch of different
            lengths.
        memory: what its process held.
    """

    decode: dict[int, Sample]
    gap: dict[int, Sample]
    gap_tail: dict[int, Sample]
    prefill: dict[int, Sample]
    first: dict[int, Sample]
    first_loaded: dict[int, Sample]
    mixed: dict[int, Sample]
    memory: Memory

    @classmethod
    def of(cls, samples: Mapping[Key, Sample], memory: Memory) -> Speeds:
        """The samples of one engine, by quantity."""
        grouped: dict[str, dict[int, Sample]] = {
            name: {} for name in cls.model_fields if name != "memory"
        }
        for key, sample in samples.items():
            grouped[key.quantity][int(key.at)] = sample
        return cls.model_validate({**grouped, "memory": memory})

    @property
    def weight_bytes(self) -> int:
        """Of one rank's weights, packed for its kernels."""
        return self.memory.weight_bytes

    @property
    def cache_tokens(self) -> int:
        """That the KV cache holds."""
        return self.memory.cache_tokens

    @property
    def first_token(self) -> Sample:
        """Seconds until the first token behind the shortest prompt measured."""
        return self.first[min(self.first)]

    @property
    def token(self) -> Sample:
        """Seconds between two tokens in the smallest batch measured."""
        return self.gap[min(self.gap)]


class Measured(Frozen):
    """What came of a measurement.

    Attributes:
        speeds: engine to what it did.
        failures: engine to why it could not finish; it has no speeds.
        noise: how still the machine was.
    """

    speeds: dict[str, Speeds]
    failures: dict[str, str]
    noise: Noise


def measure_speeds(engines: Mapping[str, Asked], plan: BenchPlan, terminal: Terminal) -> Measured:
    """Everything in `plan`, of all running engines, which take turns: A B C, then C B A.

    One that fails leaves the others running; none is stopped.

    Args:
        engines: by the names under which their speeds are wanted.
        plan: what is asked, and how often.
        terminal: where progress is shown.
    """
    rounds = Rounds(measures(plan), calibrate)
    run_rounds(rounds, engines, plan.rounds, terminal)
    memory = {label: measure_memory(engines[label]) for label in rounds.alive(engines)}
    samples = rounds.samples()
    return Measured(
        speeds={label: Speeds.of(samples[label], memory[label]) for label in memory},
        failures=rounds.failures,
        noise=Noise(seconds=tuple(rounds.seconds)),
    )


def calibrate(rounds: Rounds[Asked], engines: Mapping[str, Asked]) -> float | None:
    """Seconds of fixed work on the device of the first engine that runs; None where none does."""
    for label in rounds.alive(engines):
        try:
            return float(engines[label].ask("calibrate")["seconds"])
        except EngineError as error:
            rounds.fail(label, error)
    return None
