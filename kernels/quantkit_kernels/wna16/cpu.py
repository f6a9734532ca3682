"""CPU: codes unpacked in cache or registers, products summed in float32.

Codes - zero-points, 8-bit floats and FP4 are exact in bfloat16, and scales multiply each group's
float32 sum, so the weight's value is never rounded to 16 bits; NF4's alone is, with bfloat16
activations. Activations wider than bfloat16 are split into bfloat16 pieces whose sum is exact, or
multiplied in float32 where the CPU has no bfloat16 instructions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.code_types import CodeType
from quantkit_kernels.cpu.arithmetic import PANEL, PANEL_BYTES
from quantkit_kernels.cpu.codes import BOOK_FACTOR
from quantkit_kernels.cpu.host import Kernel, Product, host_kernel
from quantkit_kernels.cpu.panels import pack_codes, pad_bias, panels
from quantkit_kernels.cpu.run import address, new_block, plan, run
from quantkit_kernels.wna16.names import CPU_CONTAINERS, cpu_name
from quantkit_kernels.wna16.weights import PackedWeight, UniformWeight, gather_inputs

CONTAINERS = CPU_CONTAINERS

REGROUP_ROWS = 4
"""Above this many rows, activations are copied so that a group's rows lie next to each other:
rows a power of two apart would fall into the same few lines of the first-level cache."""

PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""Pieces of 8 significant bits that represent an activation exactly."""


def pack(weight: UniformWeight, dtype: torch.dtype) -> PackedWeight:
    """Panels of 32 output columns, as in `cpu.panels`.

    codes: int32 [N/32, K' * bits / 32, 32]; integers as the two's complement of code - centre.
    scales: float32 [N/32, G, 32], divided by `BOOK_FACTOR` where the code type has one.
    zeros: int8 [N/32, G, 32], zero - centre; None where all are 0, as in symmetric weights and
        those that are not integers.

    N is padded to whole panels. The layout is the same for every `dtype` and CPU.
    """
    bits, code_type = weight.container_bits, weight.code_type
    centre = _centre(weight) if code_type == "int" else 0
    zeros = weight.zeros.to(torch.int16) - centre
    has_zeros = code_type == "int" and bool(zeros.any())
    unit = host_kernel(_product(bits, code_type, dtype)).arithmetic.unit
    return PackedWeight(
        codes=pack_codes(weight.codes, bits, centre=centre, columns=weight.codes.shape[1]),
        scales=panels(weight.scales.float() / BOOK_FACTOR.get(code_type, 1.0)),
        zeros=panels(zeros.to(torch.int8)) if has_zeros else None,
        gather=weight.gather,
        bits=bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.codes.shape[0],
        kernel=cpu_name(bits, code_type, unit),
        code_type=code_type,
    )


def _product(bits: int, code_type: CodeType, dtype: torch.dtype) -> Product:
    """NF4's numbers are two bfloat16 each; with bfloat16 activations one, the nearest, will do."""
    two = code_type == "nf4" and dtype != torch.bfloat16
    return Product(bits, code_type, weight_pieces=2 if two else 1)


def _centre(weight: UniformWeight) -> int:
    """The code stored as 0: the zero-point of all groups if it is one and fits, else the middle."""
    middle = 2 ** (weight.container_bits - 1)
    first = int(weight.zeros[0, 0])
    fits = first <= middle and int(weight.codes.max()) - first < middle
    return first if fits and bool((weight.zeros == first).all()) else middle


def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    gather: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    code_type: CodeType,
    zero: None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = [x, 0][:, gather] (scales value(codes))^T + bias + residual, accumulated in float32.

    Args:
        x: [M, K]. Others as packed by `pack`.
        residual: [M, N] or None. It is added to the rounded y where x is bfloat16.

    Returns:
        [M, N] in the dtype of `x`.
    """
    kernel = host_kernel(_product(bits, code_type, x.dtype))
    groups, columns = scales.shape[1], scales.shape[0] * PANEL
    is_bf16 = x.dtype == torch.bfloat16
    out_dtype = torch.bfloat16 if is_bf16 else torch.float32
    out = torch.empty(x.shape[0], columns, dtype=out_dtype)
    if x.shape[0]:
        pieces = split_inputs(gather_inputs(x, gather, groups * group_size), kernel)
        inputs = _lay_out(pieces, groups, with_sums=zeros is not None)
        _run(kernel, inputs, codes, scales, zeros, pad_bias(bias, columns), out)
    y = out if out.shape[1] == out_features else out[:, :out_features].contiguous()
    if residual is not None:
        y += residual
    return y if is_bf16 else y.to(x.dtype)


def split_inputs(x: Tensor, kernel: Kernel) -> Tensor:
    """[P M, K'], row p M + m piece p of row m, in the dtype that the kernel multiplies.

    The pieces of a row sum to the row of x [M, K']; one piece is x itself.

    Bfloat16 pieces are cut off, not rounded: the largest finite value must not become infinite.
    """
    if kernel.arithmetic.unit == "fma":
        return x.float().contiguous()
    if x.dtype == torch.bfloat16:
        return x.contiguous()
    rest, pieces = x.float(), []
    for _ in range(PIECES[x.dtype]):
        piece = (rest.view(torch.int32) & -0x10000).view(torch.float32)
        pieces.append(piece.bfloat16())
        # Infinity - infinity is NaN; the first piece alone is to say that x is infinite.
        rest = (rest - piece).nan_to_num(nan=0.0)
    return torch.cat(pieces)


class _Inputs(NamedTuple):
    """Activations where the kernel reads them.

    Attributes:
        x: the tensor that holds them.
        rows: rows of x, those of all pieces.
        row, group: bytes from a row, and a group, to the next.
        group_size: channels in a group.
        sums: float32 [G, rows], sums over a group; None for symmetric weights.
    """

    x: Tensor
    rows: int
    row: int
    group: int
    group_size: int
    sums: Tensor | None


def _lay_out(x: Tensor, groups: int, *, with_sums: bool) -> _Inputs:
    """The groups of x [P M, K'] next to each other where there are many rows."""
    rows, columns = x.shape
    size, group_size = x.element_size(), columns // groups
    sums = None
    if with_sums:
        sums = x.view(rows, groups, group_size).sum(-1, dtype=torch.float32)
        sums = sums if rows == 1 else sums.t().contiguous()
    if rows <= REGROUP_ROWS:
        return _Inputs(x, rows, columns * size, group_size * size, group_size, sums)
    grouped = x.view(rows, groups, group_size).transpose(0, 1).contiguous()
    return _Inputs(grouped, rows, group_size * size, rows * group_size * size, group_size, sums)


def _run(
    kernel: Kernel,
    inputs: _Inputs,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out` [M, 32 * panels]."""
    chosen = plan(
        rows=out.shape[0],
        pieces=inputs.rows // out.shape[0],
        panels=codes.shape[0],
        groups=scales.shape[1],
        group_words=codes.shape[1] // scales.shape[1],
        steps=inputs.group_size * inputs.x.element_size() // 4,
        weight_pieces=kernel.arithmetic.weight_pieces,
        out_bf16=out.dtype == torch.bfloat16,
        max_threads=torch.get_num_threads(),
    )
    block = new_block(chosen)
    block.x = inputs.x.data_ptr()
    block.x_row, block.x_group = inputs.row, inputs.group
    block.x_piece = out.shape[0] * inputs.row
    block.x_sums = address(inputs.sums)
    block.x_sums_piece, block.x_sums_group = out.shape[0] * 4, inputs.rows * 4
    block.codes, block.scales = codes.data_ptr(), scales.data_ptr()
    block.scale_panel, block.scale_group = scales.shape[1] * PANEL_BYTES, PANEL_BYTES
    block.zeros, block.bias = address(zeros), address(bias)
    block.out = out.data_ptr()
    run(kernel, chosen, block)
