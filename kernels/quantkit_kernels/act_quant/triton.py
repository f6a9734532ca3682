"""CUDA: a program per row, which stays in registers.

Longer rows than registers hold, and groups that are no power of two, go the way of any device.
No launch synchronises or depends on values, so all may be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.act_quant import generic
from quantkit_kernels.act_quant.rows import ROW_ALIGNMENT, RowQuantizer
from quantkit_kernels.act_quant.source import Source, quantise_with
from quantkit_kernels.act_quant.triton_rows import quantise_row
from quantkit_kernels.triton_common import device_of

MAX_CHANNELS = 32768
"""Channels of the longest row that the registers of 512 threads hold."""

MAX_WARPS = 16

WARP_CHANNELS = 32 * ROW_ALIGNMENT
"""Channels that a warp takes at a time: a 16-byte store of codes a thread."""

FLOAT8_CAPABILITY = 89
"""The first GPUs with an instruction that converts to E4M3: Ada, capability 8.9."""


class Cut(NamedTuple):
    """How the kernel takes a row apart.

    Attributes:
        group: channels that share a scale; 0 where the row does.
        sum_group: channels of a sum; K where the row has one, 0 where it has none.
        warps: of the program that makes the row.
    """

    group: int
    sum_group: int
    warps: int

    @property
    def chunk(self) -> int:
        """Channels that the program takes at a time."""
        return self.warps * WARP_CHANNELS


def quantise(
    source: Source, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> Tensor:
    """Rows of a source."""
    if source.x.numel() == 0 or cut(quantizer, source.width) is None:
        return generic.quantise(source, quantizer, scale, zero)
    with torch.cuda.device_of(source.x):
        return quantise_with(_run, source, quantizer, scale, zero)


@lru_cache(maxsize=1024)
def cut(quantizer: RowQuantizer, width: int) -> Cut | None:
    """How the kernel takes rows of K channels apart; None where it does not.

    A thread has 32 to 63 channels, fewer in rows below 1024: enough to ask memory for, and to
    spread the work on a whole row over, yet not more registers than allow two rows at a time.
    """
    layout = quantizer.layout(width)
    group = quantizer.group_size if layout.groups > 1 else 0
    sum_group = width if layout.sums == 1 else quantizer.sum_group
    sizes = [group or 1, sum_group if layout.sums > 1 else 1]
    least = -(-max(sizes) // WARP_CHANNELS)
    if width > MAX_CHANNELS or least > MAX_WARPS or not all(_fits(size) for size in sizes):
        return None
    wanted = 1 << max(width // (2 * WARP_CHANNELS), 1).bit_length() - 1
    return Cut(group, sum_group, max(least, min(wanted, MAX_WARPS)))


def _fits(size: int) -> bool:
    """Whether chunks hold whole groups of a size, and groups whole stores; 1 stands for none."""
    return size == 1 or (size >= ROW_ALIGNMENT and size & (size - 1) == 0)


def _run(
    source: Source, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> Tensor:
    x, residual = source.x, source.residual
    row, parts = quantizer.layout(source.width).stride, cut(quantizer, source.width)
    assert parts is not None, "`quantise` asks first"
    rows = torch.empty(x.shape[0], row, dtype=torch.uint8, device=x.device)
    quantise_row[(x.shape[0],)](
        x,
        residual,
        source.weight,
        source.total,
        scale,
        zero,
        rows,
        rows.view(torch.int32),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        source.epsilon,
        quantizer.upper_bound,
        KIND=source.kind,
        E4M3=quantizer.code == "e4m3",
        SYMMETRIC=quantizer.symmetric,
        BOUNDED=quantizer.upper_bound < inf,
        CONVERT=x.is_cuda and device_of(x).capability >= FLOAT8_CAPABILITY,
        ASM=x.is_cuda,
        WIDTH=source.width,
        GROUP=parts.group,
        SUM_GROUP=parts.sum_group,
        ROW=row,
        C=parts.chunk,
        num_warps=parts.warps,
        enable_fp_fusion=True,
    )
    return rows
