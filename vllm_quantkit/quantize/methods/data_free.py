"""Rounding a weight without calibration data: what happens when a model is quantised at load."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quantkit_kernels.quant_math import minmax_scales, quantize_codes
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.quantize.methods.float8 import quantize_float8
from vllm_quantkit.quantize.methods.hqq import refine_grid
from vllm_quantkit.quantize.methods.rtn import find_grid, finite_weight, group_width, split_groups
from vllm_quantkit.spec import WeightSpec

Refinement = Literal["none", "clip", "hqq"]
"""How the grid of a group is found: its full range, the range of least squared error, or that and
then the half-quadratic refinement."""

BLOCK_VALUES = 1 << 18
"""Weights worked on at a time: the temporaries of a search stay in cache, three times faster."""


def quantize_data_free(weight: Tensor, spec: WeightSpec, refine: Refinement) -> QuantizedWeight:
    """Codes and float32 scales of a weight, each row on its own.

    Args:
        weight: float [N, K].
        spec: the numerics; integers in groups or channels, or 8-bit floats.
        refine: how integer grids are found, `hqq` for asymmetric ones; 8-bit floats always take
            the full range.

    Raises:
        QuantkitError: the weight is not finite.
    """
    if spec.code_type != "int":
        return quantize_float8(weight, spec)
    rows = max(1, BLOCK_VALUES // weight.shape[1])
    blocks = [_quantize_rows(finite_weight(block), spec, refine) for block in weight.split(rows)]
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    width = group_width(spec, weight.shape[1])
    index = torch.arange(weight.shape[1], device=weight.device) // width
    return QuantizedWeight(codes, scales, zeros, index.to(torch.int32), spec.bits)


def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """|W - Q| / |W|, Frobenius norms."""
    squared = torch.zeros(2, dtype=torch.float64)
    rows = max(1, BLOCK_VALUES // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        block = QuantizedWeight(
            quantized.codes[part],
            quantized.scales[part],
            quantized.zeros[part],
            quantized.group_index,
            quantized.bits,
            quantized.code_type,
        )
        original = weight[part].float()
        error = original - block.dequantize()
        squared += torch.stack([error.square().sum(), original.square().sum()]).cpu()
    return float((squared[0] / squared[1]).sqrt()) if squared[1] > 0 else 0.0


def _quantize_rows(
    weight: Tensor, spec: WeightSpec, refine: Refinement
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, K], scales float32 [N, G], zeros uint8 [N, G] of a few rows."""
    groups = split_groups(weight, group_width(spec, weight.shape[1]))
    if refine == "none":
        scales, zeros = minmax_scales(groups, spec.bits, symmetric=spec.symmetric)
    else:
        scales, zeros = find_grid(groups, spec, clip=True, scale_dtype=torch.float32)
    if refine == "hqq":
        scales, refined = refine_grid(groups, scales, zeros.float(), spec.bits)
        zeros = refined.to(torch.uint8)
    codes = quantize_codes(groups, scales, zeros, spec.bits).flatten(1)[:, : weight.shape[1]]
    return codes, scales.squeeze(-1), zeros.squeeze(-1)
