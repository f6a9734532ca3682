"""CUDA: packs for and launches the Triton kernels.

Few tokens are multiplied with weights dequantised in registers. For many, where the tile says so,
and for float32, weights are dequantised a chunk of rows at a time for cuBLAS, which then costs less
than the arithmetic. No launch synchronises or depends on values, so all may be captured in a CUDA
graph.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from quantkit_kernels.code_types import CodeType
from quantkit_kernels.tile_choice import wna16_tile
from quantkit_kernels.triton_common import add_splits, device_of
from quantkit_kernels.tuning import Device
from quantkit_kernels.wna16 import cuda_pack
from quantkit_kernels.wna16.cuda_layout import TILE_K, TILE_N
from quantkit_kernels.wna16.triton_dequantise import WHOLE_ROW
from quantkit_kernels.wna16.triton_kernels import dequantise_rows, wna16_gemm
from quantkit_kernels.wna16.triton_tiles import TileConfig
from quantkit_kernels.wna16.weights import PackedWeight, UniformWeight, gather_inputs

CONTAINERS = cuda_pack.CONTAINERS

DENSE_CHUNK = 1 << 24
"""Weights dequantised at a time: 32 MiB in 16 bits, so that cuBLAS finds most of them in L2."""

DENSE_WARPS = 8
"""Of `dequantise_rows`: with 4, a tile of float32 does not fit the registers."""


NO_QUADS_FROM = (3, 8)
"""Triton's version from which a joined operand of mma.sync is as any other."""

DENSE_ROWS = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}
"""Rows that one program of `dequantise_rows` writes."""


@cache
def takes_quads(device: Device) -> bool:
    """True where `tl.dot` wants four neighbouring columns of a joined operand in each thread.

    Earlier Triton does, of mma.sync: it takes `tl.join` for a sign of 8-bit values, which so were
    loaded four at a time. Packed otherwise, weights would go through shared memory.
    """
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return device.capability < 90 and version < NO_QUADS_FROM


class Operand(NamedTuple):
    """A packed weight as kernels take it.

    Attributes:
        codes: int32, `pack_codes`.
        scales: int32, `pack_scales`.
        bits: container width.
        code_type: what a code stands for.
        group_size: columns that share a scale, all of them where a whole row does.
        zero: the zero-point of all groups, or None where scale words hold them.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    code_type: CodeType
    group_size: int
    zero: int | None

    @property
    def constants(self) -> dict[str, object]:
        """The constexpr arguments of a kernel that reads it."""
        return {
            "BITS": self.bits,
            "CODE": self.code_type,
            "G": self.group_size if self.group_size <= TILE_K else WHOLE_ROW.value,
            "ZERO": self.zero,
            "QUADS": takes_quads(device_of(self.codes)),
            "ASM": self.codes.is_cuda,
        }


def pack(weight: UniformWeight, dtype: torch.dtype) -> PackedWeight:
    """As `cuda_pack` lays it out, in the order of columns that this GPU's threads want."""
    return cuda_pack.pack(weight, dtype, quads=takes_quads(device_of(weight.codes)))


def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: None,
    gather: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    code_type: CodeType,
    zero: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = [x, 0][:, gather] (scales value(codes))^T + bias + residual, accumulated in fp32.

    Args:
        x: float16, bfloat16 or float32 [M, K]. Others as packed by `pack`.
        residual: [M, N] or None.

    Returns:
        [M, N] in the dtype of `x`.
    """
    columns = codes.shape[1] * TILE_K
    inputs = gather_inputs(x, gather, columns).contiguous()
    m = inputs.shape[0]
    y = torch.empty(m, out_features, dtype=x.dtype, device=x.device)
    weight = Operand(codes, scales, bits, code_type, group_size, zero)
    added = None if residual is None else residual.contiguous()
    with torch.cuda.device_of(x):
        if x.dtype == torch.float32:
            run_dense(inputs, weight, bias, added, y)
        elif m > 0:
            shape = (m, out_features, columns)
            tile = wna16_tile(*shape, bits, group_size, code_type, device_of(x))
            if tile.dense:
                run_dense(inputs, weight, bias, added, y)
            else:
                run_tiled(inputs, weight, bias, added, y, tile)
    return y


def run_tiled(
    x: Tensor,
    weight: Operand,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    tile: TileConfig,
) -> None:
    """y = x W^T + bias + residual with W dequantised in registers, cut as `tile` says.

    Args:
        x: float16 or bfloat16 [M, K''], M at least 1.
        y: [M, N], written.
    """
    m, n = y.shape
    split = tile.splits > 1
    out = torch.empty(tile.splits, m, n, dtype=torch.float32, device=y.device) if split else y
    k_tiles = weight.codes.shape[1]
    grid = (triton.cdiv(n, tile.block_n), triton.cdiv(m, tile.block_m), tile.splits)
    wna16_gemm[grid](
        x,
        weight.codes,
        weight.scales,
        None if split else bias,
        None if split else residual,
        out,
        m,
        n,
        k_tiles,
        triton.cdiv(k_tiles, tile.splits),
        **weight.constants,
        BM=tile.block_m,
        BN=tile.block_n,
        SCALE=tile.scale_weights,
        STAGES=tile.stages,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
    if split:
        add_splits(out, bias, y, residual)


def run_dense(
    x: Tensor, weight: Operand, bias: Tensor | None, residual: Tensor | None, y: Tensor
) -> None:
    """y = x W^T + bias + residual with W dequantised to the dtype of `x`, some rows at a time.

    Args:
        x: float [M, K''].
        y: [M, N], written.
    """
    n, columns = y.shape[1], x.shape[1]
    rows = min(max(DENSE_CHUNK // columns // TILE_N, 1), weight.codes.shape[0]) * TILE_N
    scratch = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    for first in range(0, n, rows):
        chunk = slice(first, min(first + rows, n))
        count = chunk.stop - first
        grid = (triton.cdiv(count, DENSE_ROWS[x.dtype]), weight.codes.shape[1])
        dequantise_rows[grid](
            weight.codes,
            weight.scales,
            scratch,
            n,
            first,
            weight.codes.shape[1],
            **weight.constants,
            ROWS=DENSE_ROWS[x.dtype],
            num_warps=DENSE_WARPS,
            enable_fp_fusion=True,
        )
        addends = [] if bias is None else [bias[chunk]]
        addends += [] if residual is None else [residual[:, chunk]]
        transposed, out = scratch[:count].T, y[:, chunk]
        if addends:
            torch.addmm(sum(addends[1:], addends[0]).to(x.dtype), x, transposed, out=out)
        else:
            torch.mm(x, transposed, out=out)
