# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels: y^T = W x^T with W dequantised in registers, and W itself."""

import triton
import triton.language as tl

from quantkit_kernels.wna16.triton_dequantise import (
    WHOLE_ROW,
    code_pointers,
    dequantise_tile,
    exact_values,
    load_groups,
)
from quantkit_kernels.wna16.triton_unpack import TILE_K, TILE_N, scale_of


@triton.jit(do_not_specialize=["M", "k_tiles", "split_tiles"])
def wna16_gemm(
    x_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    k_tiles,
    split_tiles,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    G: tl.constexpr,
    ZERO: tl.constexpr,
    QUADS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SCALE: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[s, m, n] = sum_{k in s} x[m, k] scale[n, g(k)] value(code[n, k]) + bias[n] + residual.

    Computed transposed, W being the register operand of the tensor cores:

                    x^T  [128, BM]
        W [BN, 128] acc  [BN,  BM]       one step of k; programs are (n, m, split)

    With SCALE the sums stay in the tensor cores: weights are scaled and rounded, unless a row has
    one scale, which the sums get at the end. Without it the fp32 result of each step is scaled, for
    which G is 128 or WHOLE_ROW. Weights that are not scaled are exact.

    Args:
        x_ptr: float16 or bfloat16 [M, 128 * k_tiles].
        codes_ptr: int32, `pack_codes`.
        scales_ptr: int32, `pack_scales`.
        bias_ptr: [N] or None.
        residual_ptr: [M, N] or None.
        out_ptr: [splits, M, N]; float32 if there are several splits.
        split_tiles: k tiles per split, so that no split is empty.
        CODE: what a code stands for, as in `code_types`. Values of code books are rounded to the
            type of x.
        G: group size, or WHOLE_ROW.
        ZERO: the zero-point of all groups, or None where scale words hold them.
        QUADS: the order of columns in which codes are packed, see `cuda_layout`.
        STAGES: depth of the load pipeline.
    """
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    padded_n = tl.cdiv(N, 128) * 128
    first = split * split_tiles
    last = tl.minimum(first + split_tiles, k_tiles)
    # Else ptxas sees a path round the loop that zeroes acc, and makes every wgmma wait (C7515).
    tl.assume(first < last)
    # Rows of x beyond M are read as its last row: their results are not stored, and no mask is due.
    x_rows = tl.minimum(tokens, M - 1) * (k_tiles * TILE_K)
    x_pointers = x_ptr + x_rows[None, :] + (first * TILE_K + tl.arange(0, TILE_K))[:, None]
    pointers = code_pointers(codes_ptr, tl.program_id(0) * BN, k_tiles, BN, BITS) + first * (
        TILE_N * 4 * BITS
    )
    acc = tl.zeros((BN, BM), tl.float32)
    if G == WHOLE_ROW:
        row_words = tl.load(scales_ptr + rows)[:, None]
    # With the depth given here, loads that feed no dot product are asynchronous too: the scales.
    for k_tile in tl.range(first, last, num_stages=STAGES):
        words = tl.load(pointers)
        x = tl.load(x_pointers)
        if G == WHOLE_ROW:
            groups = (row_words,)
        else:
            groups = load_groups(scales_ptr, k_tile, rows, padded_n, BITS, G)
        w = dequantise_tile(
            words,
            groups,
            BITS,
            CODE,
            BN,
            G,
            ZERO,
            SCALE and G != WHOLE_ROW,
            False,
            QUADS,
            BF16,
            ASM,
        )
        if not ASM:  # The interpreter has no bfloat16 arithmetic.
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        if SCALE:
            acc = tl.dot(w, x, acc)
        else:
            acc += tl.dot(w, x) * scale_of(groups[0], CODE)
        pointers += TILE_N * 4 * BITS
        x_pointers += TILE_K
    if SCALE and G == WHOLE_ROW:
        acc *= scale_of(row_words, CODE)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    inside = (tokens < M)[None, :] & (rows < N)[:, None]
    offsets = tokens[None, :] * N + rows[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + split * M * N + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_row", "k_tiles"])
def dequantise_rows(
    codes_ptr,
    scales_ptr,
    out_ptr,
    N,
    first_row,
    k_tiles,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    G: tl.constexpr,
    ZERO: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[n, k] = scale[n, g(k)] value(code[n, k]); programs are (ROWS rows, k tile).

    16-bit floats are rounded as `wna16_gemm` rounds scaled weights, float32 once.

    Args:
        codes_ptr: int32, `pack_codes`.
        scales_ptr: int32, `pack_scales`.
        out_ptr: [rows, 128 * k_tiles], of any float dtype; row 0 is row first_row of the weight.
        first_row: a multiple of 128.
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    first = tl.program_id(0) * ROWS
    out_rows = first + tl.arange(0, ROWS)
    rows = first_row + out_rows
    k_tile = tl.program_id(1)
    padded_n = tl.cdiv(N, 128) * 128
    pointers = code_pointers(codes_ptr, first_row + first, k_tiles, ROWS, BITS)
    words = tl.load(pointers + k_tile * (TILE_N * 4 * BITS))
    if G == WHOLE_ROW:
        groups = (tl.load(scales_ptr + rows)[:, None],)
    else:
        groups = load_groups(scales_ptr, k_tile, rows, padded_n, BITS, G)
    if tl.float32 == DTYPE:
        if G == WHOLE_ROW:
            column_words = groups[0]
        else:
            group = k_tile * (TILE_K // G) + tl.arange(0, TILE_K) // G
            column_words = tl.load(scales_ptr + group[None, :] * padded_n + rows[:, None])
        values = exact_values(words, groups, BITS, CODE, ROWS, G, ZERO, QUADS, ASM)
        w = values * scale_of(column_words, CODE)
    else:
        BF16: tl.constexpr = tl.bfloat16 == DTYPE
        w = dequantise_tile(words, groups, BITS, CODE, ROWS, G, ZERO, True, False, QUADS, BF16, ASM)
    columns = k_tile * TILE_K + tl.arange(0, TILE_K)
    offsets = out_rows[:, None].to(tl.int64) * (k_tiles * TILE_K) + columns
    tl.store(out_ptr + offsets, w)
