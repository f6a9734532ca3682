"""The oracle: norm, activation function and quantisation in fp32, straight from the definitions.

q = clamp(rint(x * (1 / scale)) + zero, lowest, largest), half to even, with 1 / scale rounded to
float32: on every device, so that the same x and scale give the same codes. E4M3 rounds
x * (1 / scale), clamped to +-448, half to even.

A group that holds a NaN or an infinity gets the scale NaN, static or dynamic, and its codes mean
nothing: whatever is multiplied by it becomes NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import (
    LARGEST_CODE,
    PER_TENSOR,
    RowQuantizer,
    Rows,
    sum_codes,
)

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The scale of a row of zeros: its reciprocal is finite."""


def reference_quantize(
    values: Tensor, quantizer: RowQuantizer, scale: Tensor | None = None, zero: Tensor | None = None
) -> Rows:
    """Quantise rows, with the given scale or with scales made for them.

    Args:
        values: float [M, K].
        quantizer: how.
        scale: float32 [1], positive; None for dynamic scales.
        zero: float32 [1], a whole number; None for 0 or, with dynamic scales, what suits a row.
    """
    width = values.shape[1]
    size = quantizer.group_size if quantizer.group_size > 0 else max(width, 1)
    padded = torch.nn.functional.pad(values.float(), (0, -width % size))
    groups = padded.unflatten(1, (-1, size)) if width else padded[:, None, :]
    if scale is None:
        scales, zeros = _dynamic_scales(groups, quantizer)
    else:
        scales = _or_nan(scale.float().expand(groups.shape[:2]), groups)
        zeros = (torch.zeros_like(scale) if zero is None else zero).expand(len(values))
    codes = _codes(groups * scales.reciprocal()[..., None], zeros[:, None, None], quantizer)
    codes = codes.flatten(1)[:, :width]
    sums = sum_codes(codes, quantizer.sum_group) if quantizer.sum_group else None
    return Rows(codes, scales, zeros.float(), size, sums)


def reference_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + epsilon) * weight, float32 [M, K] (arXiv 1910.07467)."""
    values = x.float()
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon) * weight.float()


def reference_add(x: Tensor, residual: Tensor) -> Tensor:
    """s = x + residual, rounded to their dtype: what the norm and the next layer both read."""
    return (x.float() + residual.float()).to(x.dtype)


def reference_silu_mul(x: Tensor) -> Tensor:
    """y = silu(x[:, :K]) * x[:, K:], float32 [M, K], for x [M, 2 K] (arXiv 2002.05202)."""
    gate, up = x.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _dynamic_scales(groups: Tensor, quantizer: RowQuantizer) -> tuple[Tensor, Tensor]:
    """Scales [M, G] that cover the range of groups [M, G, g], and zeros [M]."""
    spans = groups.reshape(1, 1, -1) if quantizer.group_size == PER_TENSOR else groups
    bound = quantizer.upper_bound
    zeros = torch.zeros(len(groups), device=groups.device)
    if quantizer.symmetric:
        largest = _largest(spans.abs()).clamp_max(bound)
        scales = (largest / LARGEST_CODE[quantizer.code]).clamp_min(SMALLEST_SCALE)
    else:
        high, low = _largest(spans).clamp_max(bound), -_largest(-spans).clamp_max(bound)
        scales = ((high - low) / 255).clamp_min(SMALLEST_SCALE)
        # + 0.0 makes -0.0 positive: rows are compared byte by byte.
        zeros = torch.round(-128 - low * scales.reciprocal()).clamp(-128, 127)[:, 0] + 0.0
    return _or_nan(scales, spans).expand(groups.shape[:2]), zeros


def _largest(values: Tensor) -> Tensor:
    """max(values, 0) over the last dimension."""
    return torch.nn.functional.pad(values, (0, 1)).amax(-1)


def _or_nan(scales: Tensor, groups: Tensor) -> Tensor:
    """Scales [M, G], NaN where groups [M, G, g] are not all finite."""
    return scales.masked_fill(~groups.isfinite().all(-1), torch.nan)


def _codes(scaled: Tensor, zeros: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Round to int8 or E4M3; NaN to any code."""
    largest = LARGEST_CODE[quantizer.code]
    if quantizer.code == "e4m3":
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn)
    lowest = -largest if quantizer.symmetric else -largest - 1
    return (torch.round(scaled) + zeros).clamp(lowest, largest).nan_to_num(nan=0.0).to(torch.int8)
