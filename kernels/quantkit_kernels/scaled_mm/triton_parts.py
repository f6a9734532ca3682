# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What products of 8-bit codes are made of: order of tiles, products, scales, results.

`SWAP` says everywhere that the transpose is computed, so that few tokens fill the tensor cores,
whose first operand has 64 rows.
"""

import triton
import triton.language as tl

ROW_ZERO = tl.constexpr(1)
"""Words from the scale of a row of int8 to its zero-point."""

ROW_SUM = tl.constexpr(2)
"""Words from the scale of a row of int8 to the sum of its codes."""


@triton.jit
def tile_of(program, m_tiles, n_tiles):
    """(tile of tokens, tile of channels): bands of so many tiles of tokens that share one in L2."""
    BAND: tl.constexpr = 8
    band = program // (BAND * n_tiles)
    height = tl.minimum(m_tiles - band * BAND, BAND)
    inner = program % (BAND * n_tiles)
    return band * BAND + inner % height, inner // height


@triton.jit
def multiply(x, w, acc, SWAP: tl.constexpr, ASM: tl.constexpr):
    """acc + x w^T, or acc + w x^T where SWAP: int32 from int8, float32 from FP8."""
    if not ASM and x.dtype != tl.int8:  # The interpreter multiplies FP8 in float16.
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, out_dtype=acc.dtype)
    else:
        return tl.dot(x, tl.trans(w), acc, out_dtype=acc.dtype)


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
    """y times the scales per token that `x_scales` points to if X, and per channel alike if W.

    Args:
        x_scales: [BM].
        w_scales: [BN], or one pointer to the scale of all channels.
    """
    if W and len(w_scales.shape) == 0:
        if X:  # One multiplication per token instead of one per product.
            y *= along_tokens(tl.load(x_scales) * tl.load(w_scales), SWAP)
        else:
            y *= tl.load(w_scales)
    else:
        if X:
            y *= along_tokens(tl.load(x_scales), SWAP)
        if W:
            y *= along_channels(tl.load(w_scales), SWAP)
    return y


@triton.jit
def w_scales_of(w_scales_ptr, channels, first, W_BLOCK: tl.constexpr):
    """Pointers to the scales of channels first .. first + 127 at most: one where they share it."""
    return w_scales_ptr + first // W_BLOCK if W_BLOCK > 1 else w_scales_ptr + channels


@triton.jit
def of_channels(ptr, channels, N, SWAP: tl.constexpr):
    """Values per channel, shaped to broadcast over the products; 0 from channel N on."""
    return along_channels(tl.load(ptr + channels, mask=channels < N, other=0), SWAP)


@triton.jit
def subtract_zeros(acc, x_scales, sums_ptr, zeros_ptr, channels, N, whole, SWAP: tl.constexpr):
    """sum_k (x - zx)(w - zw) from acc = sum_k x w: acc - zx sum_k (w - zw) - zw sum_k x, in int32.

    Args:
        acc: int32.
        x_scales: [BM], where the scales of rows start, which zero-points and sums follow.
        sums_ptr: int32 [N], sum_k (w[n, k] - zw[n]); None where all zx are 0.
        zeros_ptr: int32 [N], zw; None where all are 0.
        whole: 0 leaves acc as it is, for all splits of k but one, which has 1.
    """
    if sums_ptr is not None:
        row_zeros = tl.load(x_scales + ROW_ZERO).to(tl.int32) * whole
        acc -= along_tokens(row_zeros, SWAP) * of_channels(sums_ptr, channels, N, SWAP)
    if zeros_ptr is not None:
        row_sums = tl.load(x_scales + ROW_SUM).to(tl.int32, bitcast=True) * whole
        acc -= along_tokens(row_sums, SWAP) * of_channels(zeros_ptr, channels, N, SWAP)
    return acc


@triton.jit
def store_tile(
    y, bias_ptr, residual_ptr, out_ptr, split, M, N, tokens, channels, SWAP: tl.constexpr
):
    """out[split, m, n] = y[m, n] + bias[n] + residual[m, n], of y or its transpose where SWAP."""
    if SWAP:
        y = tl.trans(y)
    inside = channels < N
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    places = (split * M + tokens).to(tl.int64)[:, None] * N + channels[None, :]
    mask = (tokens < M)[:, None] & inside[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, y.to(out_ptr.dtype.element_ty), mask=mask)
