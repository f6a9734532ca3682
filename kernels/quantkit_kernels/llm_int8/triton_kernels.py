# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of LLM.int8: find outlier channels, quantise the others, multiply both.

How many outliers there are is known on the GPU only. All shapes and grids are the same for any
number; the product reads it where it loops over them.
"""

import triton
import triton.language as tl

from quantkit_kernels.act_quant.triton_kernels import (
    INFINITY_BITS,
    MAGNITUDE_BITS,
    dynamic_scale,
    store_scales,
    to_codes,
)
from quantkit_kernels.scaled_mm.triton_kernels import accumulate
from quantkit_kernels.scaled_mm.triton_parts import scale, store_tile, tile_of

OUTLIERS = tl.constexpr(16)
"""Outlier channels that are multiplied at a time."""


@triton.jit(do_not_specialize=["M"])
def flag_outliers(x_ptr, flags_ptr, M, K, threshold, BM: tl.constexpr, BK: tl.constexpr):
    """flags[k] = 1 where any |x[m, k]| > threshold or is NaN; programs are (columns, tokens).

    Args:
        x_ptr: [M, K].
        flags_ptr: int32 [K], zeros.
    """
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    pointers = x_ptr + tokens.to(tl.int64)[:, None] * K + columns[None, :]
    x = tl.load(pointers, mask=(tokens < M)[:, None] & (columns < K)[None, :], other=0.0)
    found = tl.max(tl.where(tl.abs(x.to(tl.float32)) <= threshold, 0, 1), axis=0)
    tl.atomic_max(flags_ptr + columns, found, mask=found > 0)


@triton.jit(do_not_specialize=["count"])
def flag_given(given_ptr, flags_ptr, count, K, BLOCK: tl.constexpr):
    """flags[k] = 1 for the `count` channels given.

    Args:
        given_ptr: int32 [count].
        flags_ptr: int32 [K], zeros.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.load(given_ptr + index, mask=index < count, other=-1)
    inside = (channel >= 0) & (channel < K)
    tl.store(flags_ptr + channel, tl.full((BLOCK,), 1, tl.int32), mask=inside)


@triton.jit
def list_outliers(flags_ptr, outliers_ptr, count_ptr, K, BLOCK: tl.constexpr):
    """outliers[0 .. count - 1] = the flagged channels, in order."""
    count = 0
    for first in range(0, K, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        flagged = tl.load(flags_ptr + columns, mask=columns < K, other=0)
        position = count + tl.cumsum(flagged, axis=0) - 1
        tl.store(outliers_ptr + position, columns, mask=flagged > 0)
        count += tl.sum(flagged, axis=0)
    tl.store(count_ptr, count)


@triton.jit
def load_rest(x_ptr, flags_ptr, columns, K):
    """float32 x [1, BLOCK] of a row, 0 at outliers and beyond K."""
    inside = columns < K
    flagged = tl.load(flags_ptr + columns, mask=inside, other=1)
    return tl.load(x_ptr + columns, mask=inside & (flagged == 0), other=0.0).to(tl.float32)


@triton.jit
def quantise_rest(
    x_ptr,
    flags_ptr,
    rows_ptr,
    words_ptr,
    outliers_ptr,
    count_ptr,
    K,
    row_stride,
    BLOCK: tl.constexpr,
):
    """Rows of int8 of the channels that are no outliers, 0 at the others; a program makes a row.

    The first also lists the outliers.

    Args:
        x_ptr: [M, K].
        flags_ptr: int32 [K], 1 at outliers.
        rows_ptr: uint8 [M, row_stride], written; words_ptr is the same memory as float32.
        outliers_ptr: int32 [K], and count_ptr: int32 [1], written.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * K
    largest = tl.zeros((1,), tl.int32)
    for first in range(0, K, BLOCK):
        values = load_rest(x_ptr, flags_ptr, first + tl.arange(0, BLOCK)[None, :], K)
        # As integers, the bits of NaN are above infinity's, and those above any number's.
        bits = values.to(tl.int32, bitcast=True) & MAGNITUDE_BITS
        largest = tl.maximum(largest, tl.max(bits, axis=1))
    scales, zeros = dynamic_scale(None, largest, float("inf"), False, True)
    scales = tl.where(largest < INFINITY_BITS, scales, float("nan"))
    factor = tl.div_rn(1.0, scales)[:, None]
    scales_at = tl.cdiv(K, 16) * 16
    rows_ptr += row * row_stride
    for first in range(0, K, BLOCK):
        columns = first + tl.arange(0, BLOCK)[None, :]
        values = load_rest(x_ptr, flags_ptr, columns, K)
        codes = to_codes(values * factor, zeros, False, True, False)
        tl.store(rows_ptr + columns, codes, mask=columns < scales_at)
    words = words_ptr + row * (row_stride // 4) + scales_at // 4
    store_scales(words, scales, zeros, 1, (row_stride - scales_at) // 4, 1)
    if row == 0:
        list_outliers(flags_ptr, outliers_ptr, count_ptr, K, BLOCK)


@triton.jit
def add_outliers(
    y,
    x_pointers,
    w_pointers,
    outliers_ptr,
    count,
    first,
    step,
    SWAP: tl.constexpr,
    ASM: tl.constexpr,
):
    """y + sum_i x[m, outliers[i]] w[n, outliers[i]], i from `first` on in steps of `step`.

    Args:
        y: float32 [BM, BN], or [BN, BM] where SWAP.
        x_pointers: [BM, 1] to column 0; w_pointers [BN, 1] alike, int8.
    """
    for start in range(first, count, step):
        index = start + tl.arange(0, OUTLIERS)
        inside = index < count
        column = tl.load(outliers_ptr + index, mask=inside, other=0)[None, :]
        x = tl.load(x_pointers + column, mask=inside[None, :], other=0.0)
        if not ASM:  # The interpreter has no bfloat16 arithmetic.
            x = x.to(tl.float32)
        w = tl.load(w_pointers + column).to(x.dtype)
        if SWAP:
            y = tl.dot(w, tl.trans(x), y, input_precision="ieee")
        else:
            y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
    return y


@triton.jit(do_not_specialize=["M", "k_steps", "split_steps"])
def llm_int8_gemm(
    rows_ptr,
    row_scales_ptr,
    x_ptr,
    codes_ptr,
    w_scales_ptr,
    outliers_ptr,
    count_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    row_stride,
    w_stride,
    k_steps,
    split_steps,
    SCALES_AT: tl.constexpr,
    RAGGED: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[s, m, n] = sw[n] (sx[m] sum_k q[m, k] w[n, k] + sum_{k in O} x[m, k] w[n, k])
    + bias[n] + residual[m, n].

    The first sum in integers, the second in the type of x; both are cut into splits.

    Args:
        rows_ptr: int8 rows q of `quantise_rest`, `row_stride` bytes each, 0 at outliers.
        row_scales_ptr: the same memory as float32.
        x_ptr: [M, K].
        outliers_ptr: int32 [K], O; count_ptr: int32 [1], how many of them there are.
        Others as of `scaled_gemm`.
    """
    m_tile, n_tile = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN))
    split = tl.program_id(1)
    channels = n_tile * BN + tl.arange(0, BN)
    tokens = m_tile * BM + tl.arange(0, BM)
    # Rows of x beyond M are read as its last row: their results are not stored, and no mask is due.
    read_tokens = tl.minimum(tokens, M - 1).to(tl.int64)
    first = split * split_steps
    columns = (first * BK + tl.arange(0, BK))[None, :]
    rows = rows_ptr + read_tokens[:, None] * row_stride
    weights = codes_ptr + channels.to(tl.int64)[:, None] * w_stride
    row_scales = row_scales_ptr + read_tokens * (row_stride // 4) + SCALES_AT
    acc = accumulate(
        rows + columns,
        weights + columns,
        row_scales,
        w_scales_ptr,
        0,
        K,
        first,
        tl.minimum(first + split_steps, k_steps),
        0,
        0,
        RAGGED,
        SWAP,
        STAGES,
        ASM,
    )
    y = scale(acc.to(tl.float32), row_scales, w_scales_ptr, True, False, SWAP)
    y = add_outliers(
        y,
        x_ptr + read_tokens[:, None] * K,
        weights,
        outliers_ptr,
        tl.load(count_ptr),
        split * OUTLIERS,
        tl.num_programs(1) * OUTLIERS,
        SWAP,
        ASM,
    )
    y = scale(y, row_scales, w_scales_ptr + channels, False, True, SWAP)
    store_tile(y, bias_ptr, residual_ptr, out_ptr, split, M, N, tokens, channels, SWAP)
