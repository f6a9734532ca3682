"""CUDA: an 8-bit weight in the layout of the Triton kernels. It needs no Triton itself.

Codes are row-major, [N', K''] with both padded to multiples of 128, so that a step of the kernel
reads whole cache lines of every row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowQuantizer
from quantkit_kernels.code_types import FLOAT8_DTYPES, CodeType
from quantkit_kernels.scaled_mm.names import cuda_name
from quantkit_kernels.scaled_mm.weights import (
    INT8_ZERO,
    ScaledWeight,
    column_sums,
    column_zeros,
    group_size_of,
    rows_for,
)
from quantkit_kernels.tuning import TILE_K
from quantkit_kernels.wna16.cuda_layout import padded_columns, padded_rows
from quantkit_kernels.wna16.weights import QuantizedWeight

W_BLOCK = 128
"""Channels of a block that shares its scales."""

SMALLEST_GROUP = 32
"""Columns of the shortest 8-bit product that tensor cores make; groups are multiples of it."""


def pack(weight: QuantizedWeight, quantizer: RowQuantizer, dtype: torch.dtype) -> ScaledWeight:
    """Codes [N', K''] of the type that the tensor cores take, scales fp32 [G, N'].

    Integers become code - 128. Padding has the value 0. Where 128 channels share the scales of all
    groups, which therefore are those of blocks, there is one for them: [G, N' / 128].

    Raises:
        ValueError: groups are no multiples of 32 channels.
    """
    rows, columns = weight.codes.shape
    group_size = group_size_of(weight)
    _check_groups(quantizer, columns, group_size)
    below = padded_rows(rows) - rows
    padding = (0, padded_columns(columns) - columns, 0, below)
    integer = weight.code_type == "int"
    stored = weight.codes ^ INT8_ZERO if integer else weight.codes
    codes = torch.nn.functional.pad(stored, padding).view(code_dtype(weight.code_type))
    sums = None if quantizer.symmetric else _padded(column_sums(weight), below)
    zeros = column_zeros(weight)
    return ScaledWeight(
        codes=codes,
        scales=_packed_scales(weight.scales.float(), below, grouped=group_size < columns),
        sums=sums,
        zeros=None if zeros is None else _padded(zeros, below),
        code_type=weight.code_type,
        quantizer=rows_for(quantizer, columns, zeros),
        group_size=group_size,
        in_features=columns,
        out_features=rows,
        kernel=cuda_name(weight.code_type),
    )


def kernel_groups(quantizer: RowQuantizer, in_features: int, group_size: int) -> tuple[int, int]:
    """Columns that share a scale, of the rows and of the weight; 0 where a whole row does."""
    grouped_rows = quantizer.layout(in_features).groups > 1
    return (
        quantizer.group_size if grouped_rows else 0,
        group_size if group_size < in_features else 0,
    )


def block_k(x_group: int, w_group: int) -> int:
    """Columns of a step, which has one scale: at most 128, and a divisor of both groups."""
    return math.gcd(TILE_K, x_group, w_group)


def code_dtype(code_type: CodeType) -> torch.dtype:
    """The dtype in which the tensor cores take codes of a type."""
    return torch.int8 if code_type == "int" else FLOAT8_DTYPES[code_type]


def _padded(values: Tensor, below: int) -> Tensor:
    """[N] to [N'], zeros below."""
    return torch.nn.functional.pad(values, (0, below))


def _packed_scales(scales: Tensor, below: int, grouped: bool) -> Tensor:
    """float32 [N, G] to [G, N'], or to [G, N' / 128] where the groups are those of blocks."""
    # The last block may be short: its own last scale makes it whole.
    padded = torch.cat([scales, scales[-1:].expand(below, -1)])
    blocks = padded.unflatten(0, (-1, W_BLOCK))
    if grouped and bool((blocks == blocks[:, :1]).all()):
        padded = blocks[:, 0]
    return padded.T.contiguous()


def _check_groups(quantizer: RowQuantizer, columns: int, group_size: int) -> None:
    if block_k(*kernel_groups(quantizer, columns, group_size)) < SMALLEST_GROUP:
        raise ValueError(
            f"groups of {group_size} channels are not served; use a multiple of {SMALLEST_GROUP}"
        )
