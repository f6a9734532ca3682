# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernel for any GPU: products of 8-bit codes in the tensor cores, scaled in fp32."""

import triton
import triton.language as tl

from quantkit_kernels.scaled_mm.triton_parts import (
    multiply,
    scale,
    store_tile,
    subtract_zeros,
    tile_of,
    w_scales_of,
)


@triton.jit
def accumulate(
    x_pointers,
    w_pointers,
    x_scales,
    w_scales,
    w_scale_stride,
    K,
    first,
    last,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    RAGGED: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sum of the products of steps first .. last - 1 of k, with the scales of groups.

    Args:
        x_pointers: [BM, BK], at step `first`; w_pointers [BN, BK] alike.
        x_scales: [BM], where rows' scales start.
        w_scales: of `w_scales_of`, for the first group; `w_scale_stride` from group to group.
        Others as of `scaled_gemm`.

    Returns:
        [BM, BN], or [BN, BM] where SWAP: int32 of integers without groups, else float32.
    """
    BM: tl.constexpr = x_pointers.shape[0]
    BN: tl.constexpr = w_pointers.shape[0]
    BK: tl.constexpr = x_pointers.shape[1]
    GROUPED: tl.constexpr = X_GROUP > 0 or W_GROUP > 0
    INTEGER: tl.constexpr = x_pointers.dtype.element_ty == tl.int8
    IN_PLACE: tl.constexpr = INTEGER and not GROUPED
    shape: tl.constexpr = (BN, BM) if SWAP else (BM, BN)
    nothing = tl.zeros(shape, tl.int32 if INTEGER else tl.float32)
    acc = nothing if IN_PLACE else tl.zeros(shape, tl.float32)
    # Else ptxas sees a path round the loop that zeroes acc, and makes every wgmma wait (C7515).
    tl.assume(first < last)
    # With the depth given here, loads that feed no dot product are asynchronous too: the scales.
    for step in tl.range(first, last, num_stages=STAGES):
        if RAGGED:
            inside = step * BK + tl.arange(0, BK) < K
            x = tl.load(x_pointers, mask=inside[None, :], other=0.0)
        else:
            x = tl.load(x_pointers)
        w = tl.load(w_pointers)
        if IN_PLACE:
            acc = multiply(x, w, acc, SWAP, ASM)
        else:
            # Hopper sums FP8 products in 14 bits: a step at a time, which fp32 additions join
            # (arXiv 2412.19437, section 3.3.2).
            products = multiply(x, w, nothing, SWAP, ASM).to(tl.float32)
            if GROUPED:
                x_group = x_scales + step * BK // max(X_GROUP, 1)
                w_group = w_scales + step * BK // max(W_GROUP, 1) * w_scale_stride
                products = scale(products, x_group, w_group, X_GROUP > 0, W_GROUP > 0, SWAP)
            acc += products
        x_pointers += BK
        w_pointers += BK
    return acc


@triton.jit(do_not_specialize=["M", "k_steps", "split_steps"])
def scaled_gemm(
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    w_scales_ptr,
    sums_ptr,
    zeros_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    x_stride,
    w_stride,
    k_steps,
    split_steps,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_BLOCK: tl.constexpr,
    SCALES_AT: tl.constexpr,
    RAGGED: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[s, m, n] = sum_{k in s} sx (x[m, k] - zx[m]) sw (w[n, k] - zw[n]) + bias[n] + residual.

    Scales are sx[m, gx(k)] and sw[n, gw(k)]. Without groups the whole sum is scaled, with groups
    each step of k. SWAP computes the transpose.

    Args:
        x_ptr: int8 or E4M3 rows, `x_stride` bytes each.
        x_scales_ptr: the same memory as float32.
        codes_ptr: int8, E4M3 or E5M2 [N', w_stride].
        w_scales_ptr: float32 [G, N' / W_BLOCK].
        sums_ptr: int32 [N'], sum_k (w[n, k] - zw[n]), or None where zx is 0; no groups then.
        zeros_ptr: int32 [N'], zw, or None where it is 0; no groups then, and rows have a sum.
        bias_ptr: [N] or None. residual_ptr: [M, N] or None.
        out_ptr: [splits, M, N]; float32 if there are several splits.
        k_steps: ceil(K / BK).
        split_steps: steps per split, so that no split is empty.
        X_GROUP: columns that share a scale of x, a multiple of BK; 0 if all do. W_GROUP alike.
        W_BLOCK: channels that share the scales of their groups: 128, or 1.
        SCALES_AT: float32 offset of a row's scales, which zero-point and sum follow.
        RAGGED: K is no multiple of BK.
    """
    m_tile, n_tile = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN))
    split = tl.program_id(1)
    channels = n_tile * BN + tl.arange(0, BN)
    tokens = m_tile * BM + tl.arange(0, BM)
    # Rows of x beyond M are read as its last row: their results are not stored, and no mask is due.
    rows = tl.minimum(tokens, M - 1).to(tl.int64)
    first = split * split_steps
    columns = (first * BK + tl.arange(0, BK))[None, :]
    x_scales = x_scales_ptr + rows * (x_stride // 4) + SCALES_AT
    w_scales = w_scales_of(w_scales_ptr, channels, n_tile * BN, W_BLOCK)
    acc = accumulate(
        x_ptr + rows[:, None] * x_stride + columns,
        codes_ptr + channels.to(tl.int64)[:, None] * w_stride + columns,
        x_scales,
        w_scales,
        tl.cdiv(N, 128) * (128 // W_BLOCK),
        K,
        first,
        tl.minimum(first + split_steps, k_steps),
        X_GROUP,
        W_GROUP,
        RAGGED,
        SWAP,
        STAGES,
        ASM,
    )
    whole = (split == 0).to(tl.int32)
    acc = subtract_zeros(acc, x_scales, sums_ptr, zeros_ptr, channels, N, whole, SWAP)
    y = scale(acc.to(tl.float32), x_scales, w_scales, X_GROUP == 0, W_GROUP == 0, SWAP)
    store_tile(y, bias_ptr, residual_ptr, out_ptr, split, M, N, tokens, channels, SWAP)
