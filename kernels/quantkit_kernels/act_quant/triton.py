"""CUDA: a program per row, which stays in registers.

Longer rows than registers hold, and groups that are no power of two, go the way of any device.
No launch synchronises or depends on values, so all may be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from quantkit_kernels.act_quant import generic
from quantkit_kernels.act_quant.rows import ROW_ALIGNMENT, RowQuantizer
from quantkit_kernels.act_quant.source import Kind, Source, quantise_with
from quantkit_kernels.act_quant.triton_kernels import quantise_row
from quantkit_kernels.triton_common import device_of

MAX_CHANNELS = {"x": 32768, "silu_mul": 32768, "norm": 16384, "add_norm": 16384}
"""Channels of the longest row that the registers of 512 threads hold; a norm needs more of them."""

SMALLEST_GROUP = 16
"""Channels of the shortest group that a 16-byte store of codes fills."""

FLOAT8_CAPABILITY = 89
"""The first GPUs with an instruction that converts to E4M3: Ada, capability 8.9."""


def quantise(
    source: Source, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> Tensor:
    """Rows of a source."""
    if source.x.numel() == 0 or not is_served(source.kind, quantizer, source.width):
        return generic.quantise(source, quantizer, scale, zero)
    with torch.cuda.device_of(source.x):
        return quantise_with(_run, source, quantizer, scale, zero)


def is_served(kind: Kind, quantizer: RowQuantizer, width: int) -> bool:
    """Whether the kernel makes such rows."""
    groups, size = shape_of(quantizer, width)
    regular = quantizer.group_size <= 0 or quantizer.group_size == size
    return groups * size <= MAX_CHANNELS[kind] and regular


def shape_of(quantizer: RowQuantizer, width: int) -> tuple[int, int]:
    """G groups of S channels, powers of two that cover a row."""
    size = width if quantizer.group_size <= 0 else quantizer.group_size
    groups = quantizer.layout(width).groups
    return triton.next_power_of_2(groups), max(triton.next_power_of_2(size), SMALLEST_GROUP)


def warps_of(groups: int, size: int) -> int:
    """32 channels a thread, from 1 warp to 16."""
    return int(min(16, max(1, groups * size // 1024)))


def _run(
    source: Source, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> Tensor:
    x, residual = source.x, source.residual
    layout = quantizer.layout(source.width)
    groups, size = shape_of(quantizer, source.width)
    rows = torch.empty(x.shape[0], layout.stride, dtype=torch.uint8, device=x.device)
    quantise_row[(x.shape[0],)](
        x,
        residual,
        source.weight,
        source.total,
        scale,
        zero,
        rows,
        rows.view(torch.float32),
        source.width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        layout.stride,
        layout.groups,
        source.epsilon,
        quantizer.upper_bound,
        KIND=source.kind,
        E4M3=quantizer.code == "e4m3",
        SYMMETRIC=quantizer.symmetric,
        CONVERT=x.is_cuda and device_of(x).capability >= FLOAT8_CAPABILITY,
        RAGGED=source.width % ROW_ALIGNMENT != 0,
        G=groups,
        S=size,
        num_warps=warps_of(groups, size),
        enable_fp_fusion=True,
    )
    return rows
