"""Random activations and weights, and what a layer must make of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contender import Contender, Layer
from benchmarks.gpu.ours import EPSILON
from benchmarks.gpu.problems import Problem
from quantkit_kernels.act_quant import reference_add, reference_rms_norm, reference_silu_mul
from quantkit_kernels.wna16 import QuantizedWeight

OUTLIER_EVERY, OUTLIER = 100, 10.0
"""Every hundredth channel is ten standard deviations larger, where outliers are asked for."""

CHECKED_TOKENS = 256
"""Tokens whose results are compared: the first and last ones, and some between."""

WEIGHT_ROWS = 4096
"""Rows of a weight that are dequantised at a time."""


@dataclass(frozen=True)
class Loaded:
    """A contender's layer for a problem.

    Attributes:
        layer: ready to run.
        weight: that it was made from; None where it has none.
    """

    layer: Layer
    weight: QuantizedWeight | None


def load(contender: Contender, problem: Problem, generator: torch.Generator) -> Loaded:
    """A layer with random weights.

    Raises:
        Exception: whatever the contender raises where it cannot be had, or refuses.
    """
    if problem.op != "linear":
        return Loaded(contender.make(problem.k), None)
    weight = contender.kind.random(problem.n, problem.k, generator)
    return Loaded(contender.make(weight), weight)


def activations(
    contender: Contender, problem: Problem, m: int, generator: torch.Generator
) -> Tensor:
    """bfloat16 x: [M, K], or [M, 2 K] for gate and up."""
    width = problem.k * (2 if problem.op == "silu_mul" else 1)
    x = torch.randn(m, width, generator=generator, device=generator.device)
    if contender.outliers:
        large = x[:, ::OUTLIER_EVERY]
        large += OUTLIER * large.sign()
    return x.bfloat16()


def expected(loaded: Loaded, problem: Problem, x: Tensor, inputs: Any, rows: Tensor) -> Tensor:
    """float32: some rows of the result, from the definition."""
    if problem.op == "linear":
        assert loaded.weight is not None
        return multiply(loaded.layer.seen(inputs)[rows], loaded.weight)
    if problem.op == "silu_mul":
        return reference_silu_mul(x[rows])
    total = reference_add(x, x.roll(1, -1))[rows]
    return reference_rms_norm(total, x.new_ones(problem.k), EPSILON)


def multiply(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x W^T in float32, some rows of W at a time: all would take eight times what codes take."""
    fields = weight.codes, weight.scales, weight.zeros
    parts = [
        replace(weight, codes=codes, scales=scales, zeros=zeros)
        for codes, scales, zeros in zip(*(f.split(WEIGHT_ROWS) for f in fields), strict=True)
    ]
    return torch.cat([x @ part.dequantize().T for part in parts], 1)


def checked_rows(m: int, device: torch.device) -> Tensor:
    """Distinct tokens from the first to the last."""
    return torch.linspace(0, m - 1, min(m, CHECKED_TOKENS), device=device).round().long()


def relative_error(y: Tensor, truth: Tensor) -> float:
    """|y - truth| / |truth|; NaN where y has any."""
    return float((y - truth).norm() / truth.norm())


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated holds NaN, or the largest integer, until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
