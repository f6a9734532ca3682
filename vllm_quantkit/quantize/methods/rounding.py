"""How a weight becomes codes: what a recipe says, and what is done where its statistics fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.code_types import FLOAT8_DTYPES
from quantkit_kernels.quant_math import dequantize_codes, quantize_codes
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import QuantkitError, UnsupportedScheme
from vllm_quantkit.quantize.methods.float8 import quantize_float8
from vllm_quantkit.quantize.methods.gptq import gptq, hessian_fault
from vllm_quantkit.quantize.methods.rtn import (
    find_grid,
    finite_weight,
    group_width,
    rtn,
    split_groups,
)
from vllm_quantkit.quantize.observation.statistics import InputStats
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe
from vllm_quantkit.spec import WeightSpec

CHECKED_ROWS = 128
"""Rows, spread over the weight, on which GPTQ's error is compared with that of clipping alone."""

WORSE = 1.01
"""GPTQ's squared output error over that of clipping alone, from which on its codes are dropped."""


@dataclass(frozen=True)
class Rounded:
    """A weight's codes.

    Attributes:
        weight: the codes.
        note: sentences about what was not as planned; empty where all was.
    """

    weight: QuantizedWeight
    note: str = ""


def round_weights(
    weights: Sequence[Tensor],
    stats: InputStats | None,
    recipe: LayerRecipe,
    *,
    scale_dtype: torch.dtype,
) -> tuple[Rounded, ...]:
    """The codes of layers that read the same input, as the recipe says; what it asks once it gets.

    Statistics that are missing or broken are no error: integers are then rounded to the ranges of
    least weight error, and the note says why.

    Args:
        weights: float [N_i, K].
        stats: of their inputs; None where no token reached them.
        recipe: numerics and rounding.
        scale_dtype: what the checkpoint stores scales in; codes are made for the rounded scale.

    Raises:
        UnsupportedScheme: the numerics are not what can be rounded to.
        QuantkitError: a weight is not finite, or too large for `scale_dtype`.
    """
    spec = recipe.weight
    _refuse_unservable(spec)
    if spec.code_type != "int":
        return tuple(Rounded(quantize_float8(w, spec, scale_dtype=scale_dtype)) for w in weights)
    if recipe.rounding == "nearest":
        return tuple(Rounded(rtn(weight, spec, scale_dtype=scale_dtype)) for weight in weights)
    return _round_by_inputs([finite_weight(w) for w in weights], stats, recipe, scale_dtype)


def nearest(weight: Tensor, spec: WeightSpec, activity: Tensor | None = None) -> Tensor:
    """float32 [N, K]: each weight as its nearest code, before scales are rounded for storing.

    Args:
        weight: float [N, K].
        spec: the numerics.
        activity: float32 [K], the mean x^2 of each channel: integers are on the grid of least
            error weighted by it. None takes the full range.
    """
    if spec.code_type != "int":
        return quantize_float8(weight, spec).dequantize()
    width = group_width(spec, weight.shape[1])
    groups = split_groups(weight.float(), width)
    weights = None if activity is None else split_groups(activity[None], width)[0]
    scales, zeros = find_grid(
        groups, spec, clip=activity is not None, hessian=weights, scale_dtype=torch.float32
    )
    codes = quantize_codes(groups, scales, zeros, spec.bits)
    return dequantize_codes(codes, scales, zeros).flatten(1)[:, : weight.shape[1]]


def search_rows(weights: Sequence[Tensor], spec: WeightSpec, count: int) -> list[Tensor]:
    """About `count` rows of all weights together, evenly spread: what a search measures errors on.

    One tensor of them; all rows of each weight by itself where rows share scales.
    """
    if spec.scale_rows != 1:
        return [weight.float() for weight in weights]
    step = -(-sum(map(len, weights)) // count)
    return [torch.cat([weight[::step].float() for weight in weights])]


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """tr(E H E^T) = mean |E x|^2 over the inputs x: float32 [], for E [N, K]."""
    return ((error @ hessian) * error).sum()


def _refuse_unservable(spec: WeightSpec) -> None:
    """Refuses code types and blocks that no method here rounds to."""
    if spec.code_type not in ("int", *FLOAT8_DTYPES):
        raise UnsupportedScheme(
            f"weights cannot be rounded to {spec.code_type!r} here, only to 'int', "
            f"{' or '.join(map(repr, FLOAT8_DTYPES))}: choose one of them, or quantise at load."
        )
    if spec.code_type == "int" and spec.scale_rows != 1:
        raise UnsupportedScheme(
            f"integer weights whose scales are shared by {spec.scale_rows} rows (-1: all) cannot "
            "be made, only ones with scales per channel or group: set scale_rows to 1."
        )


def _round_by_inputs(
    weights: Sequence[Tensor],
    stats: InputStats | None,
    recipe: LayerRecipe,
    scale_dtype: torch.dtype,
) -> tuple[Rounded, ...]:
    """By `mse` or `gptq`; to the ranges of least weight error where statistics are of no use."""
    try:
        hessian = _usable_hessian(stats)
        if recipe.rounding == "gptq":
            return _by_gptq(weights, hessian, recipe, scale_dtype)
        return tuple(Rounded(_clipped(w, recipe, scale_dtype, hessian)) for w in weights)
    except QuantkitError as error:
        method = {"gptq": "GPTQ", "mse": "ranges of least output error"}[recipe.rounding]
        note = f"Rounded to ranges of least weight error instead of {method}: {error}"
        return tuple(Rounded(_clipped(w, recipe, scale_dtype), note) for w in weights)


def _usable_hessian(stats: InputStats | None) -> Tensor:
    """The Hessian.

    Raises:
        QuantkitError: there is none, or it is no mean of x x^T.
    """
    if stats is None:
        raise QuantkitError("no calibration token reached the layer.")
    if stats.hessian is None:
        raise QuantkitError("the second moments of the layer's inputs were not collected.")
    fault = hessian_fault(stats.hessian)
    if fault:
        raise QuantkitError(fault)
    return stats.hessian


def _clipped(
    weight: Tensor, recipe: LayerRecipe, scale_dtype: torch.dtype, hessian: Tensor | None = None
) -> QuantizedWeight:
    return rtn(weight, recipe.weight, clip=True, hessian=hessian, scale_dtype=scale_dtype)


def _by_gptq(
    weights: Sequence[Tensor], hessian: Tensor, recipe: LayerRecipe, scale_dtype: torch.dtype
) -> tuple[Rounded, ...]:
    """GPTQ's codes of all weights at once, and what had to be done about the Hessian."""
    codes, damping = gptq(
        torch.cat(list(weights)),
        hessian,
        recipe.weight,
        order=recipe.order,
        damping=recipe.damping,
        clip=True,
        scale_dtype=scale_dtype,
    )
    note = _hessian_note(hessian, recipe.damping, damping)
    results, start = [], 0
    for weight in weights:
        part = _rows(codes, slice(start, start + len(weight)))
        clipped = _better_clipped(part, weight, hessian, recipe, scale_dtype)
        results.append(clipped or Rounded(part, note))
        start += len(weight)
    return tuple(results)


def _hessian_note(hessian: Tensor, asked: float, used: float) -> str:
    notes = []
    if used > asked:
        notes.append(
            f"The Hessian was not positive definite with damping {asked:g}, so it was raised to "
            f"{used:g}."
        )
    dead = int((hessian.diagonal() == 0).sum())
    if dead:
        notes.append(
            f"{dead} of {len(hessian)} input channels never fired in calibration and were rounded "
            "to nearest."
        )
    return " ".join(notes)


def _better_clipped(
    codes: QuantizedWeight,
    weight: Tensor,
    hessian: Tensor,
    recipe: LayerRecipe,
    scale_dtype: torch.dtype,
) -> Rounded | None:
    """Clipping alone, where the output error of GPTQ's codes is above that of it; else None."""
    every = slice(None, None, -(-len(weight) // CHECKED_ROWS))
    rows, checked = weight[every], _rows(codes, every)
    clipped = _clipped(rows, recipe, scale_dtype, hessian)
    found, other = (float(output_error(rows - q.dequantize(), hessian)) for q in (checked, clipped))
    if found <= max(other, 0.0) * WORSE:
        return None
    return Rounded(
        _clipped(weight, recipe, scale_dtype, hessian),
        "Rounded to ranges of least output error instead of GPTQ, whose codes had a squared output "
        f"error of {found:.3g} where those have {other:.3g}.",
    )


def _rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """A copy of some rows."""
    return QuantizedWeight(
        weight.codes[rows].clone(),
        weight.scales[rows].clone(),
        weight.zeros[rows].clone(),
        weight.group_index,
        weight.bits,
        weight.code_type,
    )
