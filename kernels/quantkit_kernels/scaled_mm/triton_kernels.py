# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernel: products of 8-bit codes in the tensor cores, scaled in fp32."""

import triton
import triton.language as tl

TILE_GROUP = tl.constexpr(8)
"""Tiles of tokens that run side by side on one tile of channels, to share it in L2."""


@triton.jit
def tile_of(program, m_tiles, n_tiles):
    """(tile of tokens, tile of channels): bands of `TILE_GROUP` tiles of tokens."""
    band = program // (TILE_GROUP * n_tiles)
    height = tl.minimum(m_tiles - band * TILE_GROUP, TILE_GROUP)
    inner = program % (TILE_GROUP * n_tiles)
    return band * TILE_GROUP + inner % height, inner // height


@triton.jit
def multiply(x, w, SWAP: tl.constexpr, ASM: tl.constexpr):
    """x w^T, or its transpose w x^T where SWAP: int32 from int8, fp32 from FP8."""
    INTEGER: tl.constexpr = x.dtype == tl.int8
    if not ASM and not INTEGER:  # The interpreter multiplies FP8 in float16.
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    if SWAP:
        return tl.dot(w, tl.trans(x), out_dtype=tl.int32 if INTEGER else tl.float32)
    else:
        return tl.dot(x, tl.trans(w), out_dtype=tl.int32 if INTEGER else tl.float32)


@triton.jit
def along_tokens(values, SWAP: tl.constexpr):
    """Values per token [BM], shaped to broadcast over the products."""
    return values[None, :] if SWAP else values[:, None]


@triton.jit
def along_channels(values, SWAP: tl.constexpr):
    """Values per channel [BN], shaped to broadcast over the products."""
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def scale(y, x_scales, w_scales, X: tl.constexpr, W: tl.constexpr, SWAP: tl.constexpr):
    """y times the scales per token that `x_scales` points to if X, and per channel alike if W."""
    if X:
        y *= along_tokens(tl.load(x_scales), SWAP)
    if W:
        y *= along_channels(tl.load(w_scales), SWAP)
    return y


@triton.jit
def accumulate(
    x_pointers,
    w_pointers,
    x_scales,
    w_scales,
    padded_n,
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
        x_scales: [BM], where rows' scales start; w_scales [BN] alike.
        Others as of `scaled_gemm`.

    Returns:
        [BM, BN], or [BN, BM] where SWAP: int32 of integers without groups, else float32.
    """
    BM: tl.constexpr = x_pointers.shape[0]
    BN: tl.constexpr = w_pointers.shape[0]
    BK: tl.constexpr = x_pointers.shape[1]
    GROUPED: tl.constexpr = X_GROUP > 0 or W_GROUP > 0
    INTEGER: tl.constexpr = x_pointers.dtype.element_ty == tl.int8 and not GROUPED
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.int32 if INTEGER else tl.float32)
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
        # Hopper sums FP8 products in 14 bits: a step at a time, which fp32 additions join
        # (arXiv 2412.19437, section 3.3.2).
        products = multiply(x, w, SWAP, ASM)
        if GROUPED:
            x_group = x_scales + step * BK // max(X_GROUP, 1)
            w_group = w_scales + step * BK // max(W_GROUP, 1) * padded_n
            products = products.to(tl.float32)
            products = scale(products, x_group, w_group, X_GROUP > 0, W_GROUP > 0, SWAP)
        acc += products
        x_pointers += BK
        w_pointers += BK
    return acc


@triton.jit
def store_tile(y, bias_ptr, out_ptr, split, M, N, tokens, channels, SWAP: tl.constexpr):
    """out[split, m, n] = y[m, n] + bias[n], of y or its transpose where SWAP."""
    if SWAP:
        y = tl.trans(y)
    inside = channels < N
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (split * M + tokens).to(tl.int64)[:, None] * N + channels[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(tokens < M)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["M", "k_steps", "split_steps"])
def scaled_gemm(
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    w_scales_ptr,
    sums_ptr,
    bias_ptr,
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
    SCALES_AT: tl.constexpr,
    RAGGED: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[s, m, n] = sum_{k in s} sx[m, gx(k)] (x[m, k] - zx[m]) sw[n, gw(k)] w[n, k] + bias[n].

    Without groups the whole sum is scaled, with groups each step of k. SWAP computes the
    transpose, so that few tokens fill the tensor cores, whose first operand has 64 rows.

    Args:
        x_ptr: int8 or E4M3 rows, `x_stride` bytes each.
        x_scales_ptr: the same memory as float32.
        codes_ptr: int8, E4M3 or E5M2 [N', w_stride].
        w_scales_ptr: float32 [G, N'].
        sums_ptr: int32 [N'], sum_k w[n, k], or None where zx is 0; no groups then.
        bias_ptr: [N] or None.
        out_ptr: [splits, M, N]; float32 if there are several splits.
        k_steps: ceil(K / BK).
        split_steps: steps per split, so that no split is empty.
        X_GROUP: columns that share a scale of x, a multiple of BK; 0 if all do. W_GROUP alike.
        SCALES_AT: float32 offset of a row's scales, which the zero-point follows.
        RAGGED: K is no multiple of BK.
    """
    m_tile, n_tile = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN))
    split = tl.program_id(1)
    padded_n = tl.cdiv(N, 128) * 128
    channels = n_tile * BN + tl.arange(0, BN)
    tokens = m_tile * BM + tl.arange(0, BM)
    # Rows of x beyond M are read as its last row: their results are not stored, and no mask is due.
    rows = tl.minimum(tokens, M - 1).to(tl.int64)
    first = split * split_steps
    last = tl.minimum(first + split_steps, k_steps)
    columns = tl.arange(0, BK)
    x_pointers = x_ptr + rows[:, None] * x_stride + (first * BK + columns)[None, :]
    w_rows = channels.to(tl.int64)[:, None] * w_stride
    w_pointers = codes_ptr + w_rows + (first * BK + columns)[None, :]
    x_scales = x_scales_ptr + rows * (x_stride // 4) + SCALES_AT
    w_scales = w_scales_ptr + channels
    acc = accumulate(
        x_pointers,
        w_pointers,
        x_scales,
        w_scales,
        padded_n,
        K,
        first,
        last,
        X_GROUP,
        W_GROUP,
        RAGGED,
        SWAP,
        STAGES,
        ASM,
    )
    if sums_ptr is not None:
        zeros = tl.load(x_scales + 1).to(tl.int32) * (split == 0).to(tl.int32)
        acc -= along_tokens(zeros, SWAP) * along_channels(tl.load(sums_ptr + channels), SWAP)
    y = scale(acc.to(tl.float32), x_scales, w_scales, X_GROUP == 0, W_GROUP == 0, SWAP)
    store_tile(y, bias_ptr, out_ptr, split, M, N, tokens, channels, SWAP)
