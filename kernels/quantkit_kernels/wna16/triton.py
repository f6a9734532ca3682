"""CUDA: packs for and launches the Triton kernels.

Up to `DENSE_TOKENS` tokens, weights are dequantised in registers. Beyond, and for float32, they
are dequantised a chunk of rows at a time for cuBLAS, which then costs less than the arithmetic.
No launch synchronises or depends on values, so all may be captured in a CUDA graph.
"""

import torch
import triton
from torch import Tensor

from quantkit_kernels.code_types import CODE_BOOKS, CodeType
from quantkit_kernels.triton_common import add_splits, device_of
from quantkit_kernels.wna16.cuda_layout import (
    TILE_K,
    TILE_N,
    pack_codes,
    pack_scales,
    padded_columns,
)
from quantkit_kernels.wna16.triton_kernels import dequantise_rows, wna16_gemm
from quantkit_kernels.wna16.triton_tiles import TileConfig, select_tile
from quantkit_kernels.wna16.weights import PackedWeight, UniformWeight, gather_inputs

DENSE_TOKENS = 1024
"""From this many tokens on, cuBLAS on dequantised weights is faster."""

DENSE_CHUNK = 1 << 24
"""Weights dequantised at a time: 32 MiB in 16 bits, so that cuBLAS finds most of them in L2."""

DENSE_WARPS = 8
"""Of `dequantise_rows`: with 4, a tile of float32 does not fit the registers."""


def pack(weight: UniformWeight, dtype: torch.dtype) -> PackedWeight:
    """Codes and scales in the layout of `cuda_layout`; one layout for all dtypes."""
    columns = weight.codes.shape[1]
    missing = padded_columns(columns) - columns
    gather = weight.gather
    if gather is not None:
        gather = torch.nn.functional.pad(gather, (0, missing), value=weight.in_features)
    bits, code_type = weight.container_bits, weight.code_type
    integer = code_type == "int"
    route = "dequantise + cuBLAS" if dtype == torch.float32 else "tensor cores"
    return PackedWeight(
        codes=pack_codes(weight.codes, bits, integer=integer),
        scales=pack_scales(weight.scales, weight.zeros if integer else None, weight.group_size),
        zeros=None,
        gather=gather,
        bits=bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.codes.shape[0],
        kernel=f"Triton W{bits}A16{'' if integer else f' {code_type.upper()}'}, {route}",
        code_type=code_type,
    )


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
) -> Tensor:
    """y = [x, 0][:, gather] (scales value(codes))^T + bias, accumulated in fp32.

    Args:
        x: float16, bfloat16 or float32 [M, K]. Others as packed by `pack`.

    Returns:
        [M, N] in the dtype of `x`.
    """
    columns = codes.shape[1] * TILE_K
    inputs = gather_inputs(x, gather, columns).contiguous()
    m = inputs.shape[0]
    y = torch.empty(m, out_features, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        if x.dtype == torch.float32 or m >= DENSE_TOKENS:
            run_dense(inputs, codes, scales, bias, bits, code_type, group_size, y)
        elif m > 0:
            shape, book = (m, out_features, columns), code_type in CODE_BOOKS
            tile = select_tile(*shape, bits, group_size, device_of(x), code_book=book)
            run_tiled(inputs, codes, scales, bias, bits, code_type, group_size, y, tile)
    return y


def run_tiled(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    code_type: CodeType,
    group_size: int,
    y: Tensor,
    tile: TileConfig,
) -> None:
    """y = x W^T + bias with W dequantised in registers, cut as `tile` says.

    Args:
        x: float16 or bfloat16 [M, K''], M at least 1.
        y: [M, N], written.
    """
    m, n = y.shape
    split = tile.splits > 1
    out = torch.empty(tile.splits, m, n, dtype=torch.float32, device=y.device) if split else y
    k_tiles = codes.shape[1]
    grid = (triton.cdiv(n, tile.block_n), triton.cdiv(m, tile.block_m), tile.splits)
    wna16_gemm[grid](
        x,
        codes,
        scales,
        None if split else bias,
        out,
        m,
        n,
        k_tiles,
        triton.cdiv(k_tiles, tile.splits),
        BITS=bits,
        CODE=code_type,
        G=group_size,
        BM=tile.block_m,
        BN=tile.block_n,
        SCALE=tile.scale_weights,
        STAGES=tile.stages,
        ASM=x.is_cuda,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
    if split:
        add_splits(out, bias, y)


def run_dense(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    code_type: CodeType,
    group_size: int,
    y: Tensor,
) -> None:
    """y = x W^T + bias with W dequantised to the dtype of `x`, a chunk of its rows at a time.

    Args:
        x: float [M, K''].
        y: [M, N], written.
    """
    n, columns = y.shape[1], x.shape[1]
    rows = min(max(DENSE_CHUNK // columns // TILE_N, 1), codes.shape[0]) * TILE_N
    scratch = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    for first in range(0, n, rows):
        count = min(rows, n - first)
        grid = (triton.cdiv(count, TILE_N), codes.shape[1])
        dequantise_rows[grid](
            codes,
            scales,
            scratch,
            n,
            first // TILE_N,
            codes.shape[1],
            BITS=bits,
            CODE=code_type,
            G=group_size,
            ASM=x.is_cuda,
            num_warps=DENSE_WARPS,
            enable_fp_fusion=True,
        )
        transposed, out = scratch[:count].T, y[:, first : first + count]
        if bias is None:
            torch.mm(x, transposed, out=out)
        else:
            torch.addmm(bias[first : first + count].to(x.dtype), x, transposed, out=out)
