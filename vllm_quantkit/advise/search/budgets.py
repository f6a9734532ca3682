"""What a user limits, as a limit of the layers alone."""

from __future__ import annotations

from math import prod
from pathlib import Path

from vllm_quantkit._safetensors import read_headers
from vllm_quantkit.advise.candidates import Candidate, Scheme, scheme_named
from vllm_quantkit.advise.estimate import Estimator
from vllm_quantkit.advise.roofline import LinearClock, Work, decode_step
from vllm_quantkit.advise.search.mixture import Budget
from vllm_quantkit.advise.search.units import Unit, UnitOption
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.spec import SchemeSpec

GIB = 1 << 30

PICO = 1e12
"""Times are whole picoseconds: a small layer takes thousands of them."""


def memory_budget(folder: Path, units: tuple[Unit, ...], gib: float) -> Budget:
    """A limit of all weight files.

    Args:
        folder: of the 16-bit model.
        units: of its layers.
        gib: of the files.
    """
    return Budget(
        cost=lambda _, option: option.nbytes,
        limit=int(gib * GIB) - other_bytes(folder, units),
        words=f"--budget-gib {gib:g}",
    )


def other_bytes(folder: Path, units: tuple[Unit, ...]) -> int:
    """Of everything in the weight files but the units' weights."""
    names = {f"{layer.name}.weight" for unit in units for layer in unit.layers}
    headers = read_headers(folder)
    return sum(
        prod(header.shape) * header.dtype.itemsize
        for name, header in headers.items()
        if name not in names
    )


def speed_budget(estimator: Estimator, units: tuple[Unit, ...], speedup: float) -> Budget:
    """A limit of the time of a decode step of all sequences, which costs nothing else can shorten.

    Raises:
        ConfigError: no layers could be fast enough, since the rest of the step takes longer.
    """
    plain = Candidate(scheme=scheme_named("16-bit"))
    asked = estimator.workload
    work = estimator.work(estimator.footprint(plain))
    rows, middle = asked.batch, asked.prompt_tokens + asked.answer_tokens // 2
    step = decode_step(
        work, plain.scheme, estimator.clock, estimator.rates, rows=rows, context=middle
    )
    layers = _linear(work, estimator.clock, rows)
    left = step.seconds / speedup - (step.seconds - layers)
    if left <= 0:
        raise ConfigError(
            f"--min-speedup {speedup:g}: cache, head and fixed costs alone take "
            f"{step.seconds - layers:.2e} of the {step.seconds:.2e} seconds of a 16-bit step, so "
            f"no layers make it more than {step.seconds / (step.seconds - layers):.2f} times as "
            "fast. Ask for less, or choose a smaller KV cache."
        )

    def cost(unit: Unit, option: UnitOption) -> int:
        return round(PICO * _seconds(estimator.clock, unit, option, rows, asked.tp))

    # The 16-bit step is timed from all layers together, the units one by one.
    whole = sum(cost(unit, unit.options[0]) for unit in units) / PICO
    limit = round(PICO * left * whole / layers)
    return Budget(cost=cost, limit=limit, words=f"--min-speedup {speedup:g}")


def scheme_for(spec: SchemeSpec | None) -> Scheme:
    """The advised scheme whose kernel multiplies such a layer."""
    if spec is None:
        return scheme_named("16-bit")
    if spec.weight.code_type != "int":
        return scheme_named("fp8-block" if spec.weight.scale_rows > 1 else "fp8")
    if spec.activation is not None:
        return scheme_named("smoothquant")
    return scheme_named("int8" if spec.weight.bits == 8 else "int4")


def _seconds(clock: LinearClock, unit: Unit, option: UnitOption, rows: int, tp: int) -> float:
    scheme = scheme_for(option.spec)
    return clock.seconds(scheme, unit.weights // tp, option.nbytes // tp, rows)


def _linear(work: Work, clock: LinearClock, rows: int) -> float:
    return clock.seconds(scheme_named("16-bit"), work.weights, work.weight_bytes, rows)
