"""CUDA: packs for and launches the Triton kernel.

Codes are row-major, [N', K''] with both padded to multiples of 128, so that a step of the kernel
reads whole cache lines of every row. No launch synchronises or depends on values, so all may be
captured in a CUDA graph.
"""

import math

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowCode, RowQuantizer
from quantkit_kernels.code_types import FLOAT8_DTYPES, CodeType
from quantkit_kernels.scaled_mm.triton_launch import W_BLOCK, Operands, run_tiled
from quantkit_kernels.scaled_mm.weights import (
    INT8_ZERO,
    ScaledWeight,
    column_sums,
    column_zeros,
    group_size_of,
    row_quantizer,
    rows_for,
)
from quantkit_kernels.tile_choice import scaled_tile
from quantkit_kernels.triton_common import device_of
from quantkit_kernels.tuning import TILE_K
from quantkit_kernels.wna16.cuda_layout import padded_columns, padded_rows
from quantkit_kernels.wna16.weights import QuantizedWeight

FLOAT8_CAPABILITY = 89
"""The first GPUs whose tensor cores multiply FP8: Ada, capability 8.9."""

SMALLEST_GROUP = 32
"""Columns of the shortest 8-bit product that tensor cores make; groups are multiples of it."""


def pack(weight: QuantizedWeight, quantizer: RowQuantizer, dtype: torch.dtype) -> ScaledWeight:
    """Codes [N', K''] of the type that the tensor cores take, scales fp32 [G, N'].

    Integers become code - 128. Padding has the value 0. Where 128 channels share the scales of all
    groups, which therefore are those of blocks, there is one for them: [G, N' / 128].

    Raises:
        ValueError: the GPU has no FP8 tensor cores, or groups are no multiples of 32 channels.
    """
    rows, columns = weight.codes.shape
    group_size = group_size_of(weight)
    _check_served(weight, quantizer, group_size)
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
        kernel=f"Triton W8A8 {'INT8' if integer else 'FP8'}, tensor cores",
    )


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


def linear(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    code_type: CodeType,
    row_code: RowCode,
    row_group: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """y = (sx (xq - zx)) (sw (value(codes) - zeros))^T + bias + residual.

    Args:
        rows: uint8 [M, stride], as `row_quantizer` lays them out.
        residual: [M, N] or None.
        code_type: told by the dtype of `codes` here. Others as packed by `pack`.

    Returns:
        [M, N] in `dtype`.
    """
    m = rows.shape[0]
    y = torch.empty(m, out_features, dtype=dtype, device=rows.device)
    if m == 0:
        return y
    quantizer = row_quantizer(row_code, row_group, in_features, zeros is not None)
    groups = kernel_groups(quantizer, in_features, group_size)
    given = Operands(
        rows=rows.contiguous(),
        codes=codes,
        scales=scales,
        sums=sums,
        zeros=zeros,
        bias=bias,
        residual=None if residual is None else residual.contiguous(),
        quantizer=quantizer,
        groups=groups,
        in_features=in_features,
    )
    with torch.cuda.device_of(rows):
        shape, step = (m, out_features, in_features), (block_k(*groups), max(groups) > 0)
        tile = scaled_tile(*shape, *step, code_type, device_of(rows))
        run_tiled(given, y, tile)
    return y


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


def _check_served(weight: QuantizedWeight, quantizer: RowQuantizer, group_size: int) -> None:
    capability = device_of(weight.codes).capability
    if weight.code_type != "int" and capability < FLOAT8_CAPABILITY:
        raise ValueError(
            f"a GPU of capability {capability / 10} has no FP8 tensor cores, which take 8.9; use "
            "the weight with 16-bit activations"
        )
    step = block_k(*kernel_groups(quantizer, weight.codes.shape[1], group_size))
    if step < SMALLEST_GROUP:
        raise ValueError(
            f"groups of {group_size} channels are not served; use a multiple of {SMALLEST_GROUP}"
        )
