"""What a run will take and give, before it starts: bytes, memory and about how long."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from vllm_quantkit._safetensors import read_headers
from vllm_quantkit.quantize.calibration import CalibrationOptions
from vllm_quantkit.quantize.job import Job
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.quantize.plan import BlockPlan, LayerPlan, Plan, make_plan, stored_bytes
from vllm_quantkit.quantize.run_options import GIB

PROBE_SIZE = 1024
PROBE_SECONDS = 0.2

AWQ_ALPHAS = 20
"""Candidates of the scale search; each rounds every weight of a stage."""

ROUND_BYTES = 40
"""Bytes of memory traffic for rounding one weight once, temporaries included."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take and give.

    Attributes:
        plan: what becomes of each layer.
        bytes_before, bytes_after: of the weight files.
        memory: bytes of one block, the sums of one pass, and the hidden states.
        seconds: about; within a factor of two.
    """

    plan: Plan
    bytes_before: int
    bytes_after: int
    memory: dict[str, int]
    seconds: float

    @property
    def schemes(self) -> Mapping[str, int]:
        """Numerics and method in words, to the number of layers that get them."""
        return Counter(
            f"{layer.scheme.describe()} ({_method(layer)})"
            for layer in self.plan.layers
            if layer.scheme is not None and layer.recipe is not None
        )

    def summary(self) -> dict[str, Any]:
        """These figures by name, and the plan in short."""
        return {
            "schemes": self.schemes,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "memory_bytes": self.memory,
            "seconds": self.seconds,
            "warnings": self.plan.warnings,
        }

    def lines(self) -> Iterator[str]:
        """The plan and these figures in a few lines."""
        for words, count in self.schemes.items():
            yield f"{count} layers: {words}"
        yield f"weights: {self.bytes_before:,} -> {self.bytes_after:,} bytes"
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.memory.items())
        yield f"memory beside the libraries: {parts}"
        yield f"time: about {_duration(self.seconds)}"
        yield from (f"warning: {warning}" for warning in self.plan.warnings)


def estimate(job: Job) -> Estimate:
    """Plans the job and estimates it; no weight is read.

    Raises:
        ConfigError, UnsupportedScheme, CheckpointError: as a run would.
    """
    device = job.run.torch_device()
    trust = job.run.trust_remote_code
    shell = ModelShell.open(job.source, device=device, trust_remote_code=trust)
    plan = make_plan(shell, job.recipe)
    before = sum(
        prod(header.shape) * header.dtype.itemsize for header in read_headers(job.source).values()
    )
    saved = sum(
        layer.shape.out_features * layer.shape.in_features * shell.stored_dtype.itemsize
        - stored_bytes(layer)
        for layer in plan.layers
    )
    tokens, held_out = _tokens(job.calibration, job.max_length())
    width = int(shell.config.get_text_config().hidden_size)
    largest = max(map(_parameters, plan.blocks))
    memory = {"one block": 4 * largest, "sums": min(_sums(plan), int(job.run.statistics_gib * GIB))}
    if job.run.hidden_states == "cpu":
        memory["hidden states"] = 4 * width * (tokens + 2 * held_out)
    seconds = _operations(plan, tokens, held_out) / _throughput(device)
    return Estimate(plan, before, before - saved, memory, seconds)


def _tokens(options: CalibrationOptions | None, max_length: int) -> tuple[int, int]:
    """Calibration and held-out tokens, at most."""
    if options is None:
        return 0, 0
    length = options.length or min(2048, max_length)
    return options.samples * length, options.held_out * length


def _parameters(block: BlockPlan) -> int:
    return sum(
        layer.shape.out_features * layer.shape.in_features for layer in block.layers.values()
    )


def _sums(plan: Plan) -> int:
    """Bytes of the sums of the largest block."""
    return max(sum(4 * width * width for width in _hessians(block)) for block in plan.blocks)


def _hessians(block: BlockPlan) -> Iterator[int]:
    """Width of every second moment that is summed."""
    for stage in block.stages:
        for group in stage.groups:
            recipes = [layer.recipe for layer in block.quantized(group)]
            if any(recipe is not None and recipe.rounding != "nearest" for recipe in recipes):
                yield block.layers[group[0]].shape.in_features


def _operations(plan: Plan, tokens: int, held_out: int) -> float:
    """Multiplications and additions of the matrix products, and what rounding counts as."""
    total = 0.0
    for block in plan.blocks:
        total += 2 * _parameters(block) * (2 * tokens + 2 * held_out)
        total += sum(2 * tokens * width * width for width in _hessians(block)) if tokens else 0
        total += sum(_rounding(layer) for layer in block.layers.values())
    return total


def _rounding(layer: LayerPlan) -> float:
    rows, width = layer.shape.out_features, layer.shape.in_features
    if layer.recipe is None:
        return 0.0
    searches = AWQ_ALPHAS if layer.recipe.transform == "awq" else 1
    total = float(searches * ROUND_BYTES * rows * width)
    if layer.recipe.transform == "awq":
        total += 2 * AWQ_ALPHAS * rows * width * width
    if layer.recipe.rounding == "gptq":
        total += rows * width * width + 2 * width**3
    return total


def _throughput(device: torch.device) -> float:
    """Operations per second of a float32 matrix product here."""
    matrix = torch.ones(PROBE_SIZE, PROBE_SIZE, device=device)
    matrix @ matrix
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < PROBE_SECONDS:
        float((matrix @ matrix)[0, 0])
        done += 1
    return done * 2 * PROBE_SIZE**3 / elapsed


def _method(layer: LayerPlan) -> str:
    recipe = layer.recipe
    if recipe is None:
        return ""
    parts = [part for part in (recipe.transform, recipe.rounding) if part != "none"]
    return " + ".join(parts)


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / (1 << 20):.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
