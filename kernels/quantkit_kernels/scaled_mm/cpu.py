"""CPU: 8-bit rows staged as the kernel multiplies them, products summed in integers or float32.

Integers are multiplied by AVX512-VNNI and summed in 32 bits. Without it, a group of at most
512 products is summed in float32, where it is exact, and groups are added in 32 bits. 8-bit
floats are exact in bfloat16; their products are summed in float32.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowCode, RowLayout, RowQuantizer
from quantkit_kernels.code_types import CodeType
from quantkit_kernels.cpu.arithmetic import PANEL, PANEL_BYTES
from quantkit_kernels.cpu.host import ArgumentBlock, Kernel, Product, host_kernel
from quantkit_kernels.cpu.panels import pack_codes, pad_bias, panels
from quantkit_kernels.cpu.run import ALIGNMENT, Plan, address, new_block, plan, run
from quantkit_kernels.scaled_mm.names import cpu_name
from quantkit_kernels.scaled_mm.weights import (
    INT8_ZERO,
    ScaledWeight,
    column_sums,
    column_zeros,
    group_size_of,
    row_quantizer,
    rows_for,
)
from quantkit_kernels.wna16.weights import QuantizedWeight

INTEGER_CHUNK, FLOAT_CHUNK = 512, 256
"""Most input channels multiplied at a time where an output channel has one scale: packed integers
or unpacked floats that leave half the first-level cache to rows and to what comes next. 512
products of 8-bit integers stay below 2**24."""

BLOCK = 16
"""Input channels that are staged at a time; groups are multiples of it."""


_NO_ZEROS = torch.zeros(PANEL, dtype=torch.int32)
"""Zero-points of every panel of a weight that has none."""


def pack(weight: QuantizedWeight, quantizer: RowQuantizer, dtype: torch.dtype) -> ScaledWeight:
    """Panels of 32 output columns, as in `cpu.panels`, for every `dtype` and CPU.

    codes: int32 [N/32, K' / 4, 32], code - 128 in two's complement, or the bits of an 8-bit float;
        K' is K padded with zeros to whole groups, or to equal chunks where a channel has one scale.
    scales: float32 [N/32, G, 32].
    sums: int32 [N/32, 1, 32] of integers, else None; zeros alike where any is not 0.
    """
    out_features, in_features = weight.codes.shape
    group_size = group_size_of(weight)
    is_int = weight.code_type == "int"
    centre = INT8_ZERO if is_int else 0
    groups, channels = cut(in_features, group_size, is_int)
    zeros = column_zeros(weight)
    unit = host_kernel(Product(8, weight.code_type, quantizer.code)).arithmetic.unit
    return ScaledWeight(
        codes=pack_codes(weight.codes, 8, centre=centre, columns=groups * channels),
        scales=panels(weight.scales.float()),
        sums=panels(column_sums(weight)[:, None]) if is_int else None,
        zeros=None if zeros is None else panels(zeros[:, None]),
        code_type=weight.code_type,
        quantizer=rows_for(quantizer, in_features, zeros),
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
        kernel=cpu_name(weight.code_type, unit),
    )


def cut(in_features: int, group_size: int, integers: bool) -> tuple[int, int]:
    """How many groups of channels are multiplied at a time, and how many channels each has."""
    if group_size < in_features:
        return -(-in_features // group_size), group_size
    chunk = INTEGER_CHUNK if integers else FLOAT_CHUNK
    groups = -(-in_features // chunk)
    return groups, -(-in_features // groups // BLOCK) * BLOCK


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
        rows: uint8 [M, stride]. Others as packed by `pack`.
        residual: [M, N] or None.
        dtype: of the result.

    Returns:
        [M, N] in `dtype`.
    """
    kernel = host_kernel(Product(8, code_type, row_code))
    count, columns = rows.shape[0], codes.shape[0] * PANEL
    # A residual is added before results are rounded.
    is_bf16 = dtype == torch.bfloat16 and residual is None
    out = torch.empty(count, columns, dtype=dtype if is_bf16 else torch.float32)
    if count:
        quantizer = row_quantizer(row_code, row_group, in_features, zeros is not None)
        layout, shape = quantizer.layout(in_features), (group_size, in_features)
        chosen = _plan(kernel, layout, count, columns, *shape, is_bf16, torch.get_num_threads())
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        padded_bias = pad_bias(bias, columns)
        block = new_block(chosen)
        _describe_rows(block, rows, layout)
        block.codes, block.scales = codes.data_ptr(), scales.data_ptr()
        block.column_sums, block.bias = address(sums), address(padded_bias)
        if zeros is None:
            block.column_zeros = address(_NO_ZEROS)
        else:
            block.column_zeros, block.column_zero_panel = address(zeros), PANEL_BYTES
        block.out = out.data_ptr()
        run(kernel, chosen, block)
    y = out if columns == out_features else out[:, :out_features].contiguous()
    y = y if residual is None else y.add_(residual)
    return y if is_bf16 else y.to(dtype)


@lru_cache(maxsize=4096)
def _plan(
    kernel: Kernel,
    layout: RowLayout,
    rows: int,
    columns: int,
    group_size: int,
    in_features: int,
    out_bf16: bool,
    max_threads: int,
) -> Plan:
    """What a call needs besides the addresses of its tensors."""
    groups, channels = cut(in_features, group_size, kernel.arithmetic.sums_are_integers)
    steps = channels // kernel.arithmetic.channels
    chosen = plan(
        rows=rows,
        pieces=1,
        panels=columns // PANEL,
        groups=groups,
        group_words=channels // 4,
        steps=steps,
        weight_pieces=1,
        out_bf16=out_bf16,
        max_threads=max_threads,
    )
    block, has_groups = new_block(chosen), group_size < in_features
    block.x_row, block.x_group = 4 * steps, rows * 4 * steps
    block.group_blocks, block.source_blocks = channels // BLOCK, layout.scales_at // BLOCK
    block.scale_panel = (groups if has_groups else 1) * PANEL_BYTES
    block.scale_group = PANEL_BYTES if has_groups else 0
    block.x_scale_group = 4 if layout.groups > 1 else 0
    block.in_features = in_features
    staged = -(-rows * groups * 4 * steps // ALIGNMENT) * ALIGNMENT
    return replace(chosen, block=block, staged_bytes=staged)


def _describe_rows(block: ArgumentBlock, rows: Tensor, layout: RowLayout) -> None:
    """Where codes, scales, zero-points and sums of uint8 [M, stride] lie."""
    start = rows.data_ptr()
    block.source, block.source_row = start, rows.stride(0)
    block.x_scales, block.x_zeros = start + layout.scales_at, start + layout.zero_at
    # Without sums any number will do, which no weight then multiplies by more than 0.
    block.x_code_sums = start + (layout.sums_at if layout.sums else layout.zero_at)
