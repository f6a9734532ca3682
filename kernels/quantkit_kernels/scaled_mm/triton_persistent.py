# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernel for many tokens on Hopper and Blackwell: one program on each multiprocessor.

Codes come through TMA, in blocks that the hardware fetches by itself and pads with zeros. A program
takes one tile after the other, and while it stores one the next one's codes are on their way.
"""

import triton
import triton.language as tl

from quantkit_kernels.scaled_mm.triton_parts import (
    multiply,
    of_channels,
    scale,
    store_tile,
    subtract_zeros,
    tile_of,
    w_scales_of,
)

PART = tl.constexpr(64)
"""Channels that are stored at a time: all of a tile at once take more registers than there are."""


@triton.jit
def store_parts(
    acc,
    x_scales,
    w_scales_ptr,
    sums_ptr,
    zeros_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    tokens,
    first,
    X: tl.constexpr,
    W: tl.constexpr,
):
    """out[m, n] = y[m, n] + bias[n] + residual[m, n], y being acc with zero-points and scales.

    Args:
        acc: [BM, channels of this part], of which channel `first` is the first.
        x_scales: [BM], where rows' scales start.
        X: rows are scaled here. W: so are channels.
        Others as of `persistent_gemm`.
    """
    WIDTH: tl.constexpr = acc.shape[1]
    if WIDTH > PART:
        pair = acc.reshape(acc.shape[0], 2, WIDTH // 2).permute(0, 2, 1)
        left, right = tl.split(pair)
        pointers = (w_scales_ptr, sums_ptr, zeros_ptr, bias_ptr, residual_ptr, out_ptr)
        store_parts(left, x_scales, *pointers, M, N, tokens, first, X, W)
        store_parts(right, x_scales, *pointers, M, N, tokens, first + WIDTH // 2, X, W)
    else:
        channels = first + tl.arange(0, WIDTH)
        acc = subtract_zeros(acc, x_scales, sums_ptr, zeros_ptr, channels, N, 1, False)
        y = scale(acc.to(tl.float32), x_scales, w_scales_ptr, X, False, False)
        if W:
            y *= of_channels(w_scales_ptr, channels, N, False)
        store_tile(y, bias_ptr, residual_ptr, out_ptr, 0, M, N, tokens, channels, False)


@triton.jit(do_not_specialize=["M", "k_steps"])
def persistent_gemm(
    x_codes,
    x_scales_ptr,
    w_codes,
    w_scales_ptr,
    sums_ptr,
    zeros_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    x_words,
    k_steps,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_BLOCK: tl.constexpr,
    SCALES_AT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[m, n] = sum_k sx (x[m, k] - zx[m]) sw (w[n, k] - zw[n]) + bias[n] + residual[m, n].

    Args:
        x_codes: descriptor of int8 or E4M3 [M, K]; w_codes of int8, E4M3 or E5M2 [N', K''].
        x_words: float32 values from a row to the next.
        Others as of `scaled_gemm`.
    """
    INTEGER: tl.constexpr = x_codes.dtype == tl.int8
    GROUPED: tl.constexpr = X_GROUP > 0 or W_GROUP > 0
    # Hopper sums FP8 products in 14 bits, unless fp32 additions join those of each step. Wide tiles
    # leave no registers for that. Simulated, their sums of 4096 normal products are off by 0.13%,
    # of 16384 by 0.30%, where rounding to FP8 has cost 3.8%: the fast accumulation of CUTLASS.
    IN_PLACE: tl.constexpr = not GROUPED and (INTEGER or BN > 128)
    m_tiles = tl.cdiv(M, BM)
    n_tiles = tl.cdiv(N, BN)
    w_scale_stride = tl.cdiv(N, 128) * (128 // W_BLOCK)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0), flatten=True):
        m_tile, n_tile = tile_of(tile, m_tiles, n_tiles)
        tokens = m_tile * BM + tl.arange(0, BM)
        rows = tl.minimum(tokens, M - 1).to(tl.int64)
        x_scales = x_scales_ptr + rows * x_words + SCALES_AT
        first = n_tile * BN
        w_scales = w_scales_of(w_scales_ptr, first + tl.arange(0, BN), first, W_BLOCK)
        nothing = tl.zeros((BM, BN), tl.int32 if INTEGER else tl.float32)
        acc = nothing if IN_PLACE else tl.zeros((BM, BN), tl.float32)
        tl.assume(k_steps > 0)
        for step in tl.range(0, k_steps, num_stages=STAGES):
            x = x_codes.load([m_tile * BM, step * BK])
            w = w_codes.load([first, step * BK])
            if IN_PLACE:
                acc = multiply(x, w, acc, False, ASM)
            else:
                products = multiply(x, w, nothing, False, ASM).to(tl.float32)
                if GROUPED:
                    x_group = x_scales + step * BK // max(X_GROUP, 1)
                    w_group = w_scales + step * BK // max(W_GROUP, 1) * w_scale_stride
                    products = scale(products, x_group, w_group, X_GROUP > 0, W_GROUP > 0, False)
                acc += products
        store_parts(
            acc,
            x_scales,
            w_scales_ptr,
            sums_ptr,
            zeros_ptr,
            bias_ptr,
            residual_ptr,
            out_ptr,
            M,
            N,
            tokens,
            first,
            X_GROUP == 0,
            W_GROUP == 0,
        )
