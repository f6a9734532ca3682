"""CUDA: launches the Triton kernels of LLM.int8, on weights of `scaled_mm.triton`.

No launch synchronises or depends on values, so all may be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from quantkit_kernels.llm_int8.reference import ROWS
from quantkit_kernels.llm_int8.triton_kernels import (
    flag_given,
    flag_outliers,
    llm_int8_gemm,
    quantise_rest,
)
from quantkit_kernels.scaled_mm.triton_tiles import ScaledTile
from quantkit_kernels.tile_choice import llm_int8_tile
from quantkit_kernels.triton_common import add_splits, device_of

FLAG_TOKENS, FLAG_COLUMNS = 64, 128
"""What one program of `flag_outliers` looks at."""

GIVEN_BLOCK = 256
"""Channels that one program of `flag_given` flags."""

QUANTISE_BLOCK, QUANTISE_WARPS = 4096, 8
"""Columns that `quantise_rest` has in registers at a time, 16 in each thread."""


@dataclass(frozen=True)
class SplitInput:
    """x in its two parts.

    Attributes:
        x: [M, K], read at outliers.
        rows: uint8 [M, stride], int8 of the other channels.
        outliers: int32 [K], of which the first count are the outlier channels.
        count: int32 [1].
    """

    x: Tensor
    rows: Tensor
    outliers: Tensor
    count: Tensor


def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    outliers: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    threshold: float,
    in_features: int,
    out_features: int,
) -> Tensor:
    """y = x_O W_O^T + (sx Q(x_rest)) W_rest^T + bias + residual.

    Args:
        x: [M, K].
        codes, scales, sums: as packed by `scaled_mm.triton` for symmetric int8 rows.
        residual: [M, N] or None.
        outliers: int32 [any], O; None for the channels with any |x[m, k]| above the threshold.

    Returns:
        [M, N] in the dtype of `x`.
    """
    m = x.shape[0]
    y = torch.empty(m, out_features, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    with torch.cuda.device_of(x):
        parts = split_input(x.contiguous(), flag(x.contiguous(), threshold, outliers))
        added = residual if residual is None else residual.contiguous()
        tile = llm_int8_tile(m, out_features, in_features, device_of(x))
        run_tiled(parts, codes, scales, bias, added, y, tile)
    return y


def flag(x: Tensor, threshold: float, outliers: Tensor | None) -> Tensor:
    """int32 [K]: 1 at outliers, 0 elsewhere.

    Args:
        x: [M, K], contiguous.
        threshold, outliers: as of `linear`.
    """
    m, k = x.shape
    flags = torch.zeros(k, dtype=torch.int32, device=x.device)
    if outliers is None:
        grid = (triton.cdiv(k, FLAG_COLUMNS), triton.cdiv(m, FLAG_TOKENS))
        size = {"BM": FLAG_TOKENS, "BK": FLAG_COLUMNS}
        flag_outliers[grid](x, flags, m, k, threshold, **size, enable_fp_fusion=True)
    elif count := outliers.numel():
        blocks = triton.cdiv(count, GIVEN_BLOCK)
        given = outliers.contiguous()
        flag_given[(blocks,)](given, flags, count, k, BLOCK=GIVEN_BLOCK, enable_fp_fusion=True)
    return flags


def split_input(x: Tensor, flags: Tensor) -> SplitInput:
    """Quantise what is not flagged, list what is.

    Args:
        x: [M, K], contiguous, M at least 1.
        flags: of `flag`.
    """
    m, k = x.shape
    stride = ROWS.layout(k).stride
    rows = torch.empty(m, stride, dtype=torch.uint8, device=x.device)
    parts = SplitInput(x, rows, torch.empty_like(flags), torch.empty_like(flags[:1]))
    quantise_rest[(m,)](
        x,
        flags,
        rows,
        rows.view(torch.float32),
        parts.outliers,
        parts.count,
        k,
        stride,
        BLOCK=QUANTISE_BLOCK,
        num_warps=QUANTISE_WARPS,
        enable_fp_fusion=True,
    )
    return parts


def run_tiled(
    parts: SplitInput,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    tile: ScaledTile,
) -> None:
    """The product, cut as `tile` says.

    Args:
        codes, scales, bias, residual: as of `linear`.
        y: [M, N], written.
    """
    m, n = y.shape
    k = parts.x.shape[1]
    split = tile.splits > 1
    out = torch.empty(tile.splits, m, n, dtype=torch.float32, device=y.device) if split else y
    k_steps = triton.cdiv(k, tile.block_k)
    tiles = triton.cdiv(n, tile.block_n) * triton.cdiv(m, tile.block_m)
    llm_int8_gemm[(tiles, tile.splits)](
        parts.rows.view(torch.int8),
        parts.rows.view(torch.float32),
        parts.x,
        codes,
        scales,
        parts.outliers,
        parts.count,
        None if split else bias,
        None if split else residual,
        out,
        m,
        n,
        k,
        parts.rows.shape[1],
        codes.shape[1],
        k_steps,
        triton.cdiv(k_steps, tile.splits),
        SCALES_AT=ROWS.layout(k).scales_at // 4,
        RAGGED=k % tile.block_k != 0,
        SWAP=tile.swap,
        BM=tile.block_m,
        BN=tile.block_n,
        BK=tile.block_k,
        STAGES=tile.stages,
        ASM=y.is_cuda,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
    if split:
        add_splits(out, bias, y, residual)
