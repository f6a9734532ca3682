"""CUDA: packs for and launches the Triton kernels.

Up to `DENSE_TOKENS` tokens, weights are dequantised in registers. Beyond, and for float32, they
are dequantised a chunk of rows at a time for cuBLAS, which then costs less than the arithmetic.
No launch synchronises or depends on values, so all may be captured in a CUDA graph.
"""

import functools

import torch
import triton
from torch import Tensor

from quantkit_kernels.tuning import Device, TileConfig, select_tile
from quantkit_kernels.wna16.cuda_layout import (
    TILE_K,
    TILE_N,
    pack_codes,
    pack_scales,
    padded_columns,
)
from quantkit_kernels.wna16.triton_kernels import dequantise_rows, sum_splits, wna16_gemm
from quantkit_kernels.wna16.weights import PackedWeight, UniformWeight, gather_inputs

DENSE_TOKENS = 1024
"""From this many tokens on, cuBLAS on dequantised weights is faster."""

DENSE_CHUNK = 1 << 24
"""Weights dequantised at a time: 32 MiB in 16 bits, so that cuBLAS finds most of them in L2."""

DENSE_WARPS = 8
"""Of `dequantise_rows`: with 4, a tile of float32 does not fit the registers."""

SUM_BLOCK = 512
"""Output channels that one program of `sum_splits` adds up."""

INTERPRETED = Device(capability=90, multiprocessors=132, shared_bytes=227 * 1024)
"""The device that tensors on the CPU stand for; only the interpreter sees them."""


def pack(weight: UniformWeight, dtype: torch.dtype) -> PackedWeight:
    """Codes and scales in the layout of `cuda_layout`; one layout for all dtypes."""
    columns = weight.codes.shape[1]
    missing = padded_columns(columns) - columns
    gather = weight.gather
    if gather is not None:
        gather = torch.nn.functional.pad(gather, (0, missing), value=weight.in_features)
    bits = weight.container_bits
    route = "dequantise + cuBLAS" if dtype == torch.float32 else "tensor cores"
    return PackedWeight(
        codes=pack_codes(weight.codes, bits),
        scales=pack_scales(weight.scales, weight.zeros, weight.group_size),
        zeros=None,
        gather=gather,
        bits=bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.codes.shape[0],
        kernel=f"Triton W{bits}A16, {route}",
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
) -> Tensor:
    """y = [x, 0][:, gather] (scales (codes - zeros))^T + bias, accumulated in fp32.

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
            run_dense(inputs, codes, scales, bias, bits, group_size, y)
        elif m > 0:
            tile = select_tile(m, out_features, columns, bits, group_size, device_of(x))
            run_tiled(inputs, codes, scales, bias, bits, group_size, y, tile)
    return y


def run_tiled(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
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
        sums = (triton.cdiv(n, SUM_BLOCK), m)
        sum_splits[sums](out, bias, y, m, n, tile.splits, BLOCK=SUM_BLOCK, enable_fp_fusion=True)


def run_dense(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
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


def device_of(x: Tensor) -> Device:
    """The GPU of `x`."""
    return _cuda_device(x.get_device()) if x.is_cuda else INTERPRETED


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        capability=10 * properties.major + properties.minor,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )
