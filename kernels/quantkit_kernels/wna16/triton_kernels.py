# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels: y^T = W x^T with W dequantised in registers, and W itself."""

import triton
import triton.language as tl

from quantkit_kernels.wna16.triton_codes import look_up, unpack_float8
from quantkit_kernels.wna16.triton_unpack import (
    TILE_K,
    TILE_N,
    add_pair,
    arrange4,
    arrange8,
    make_pair,
    mul_pair,
    negative_zero_pair,
    scale_of,
    spread,
    unpack4,
    unpack8,
)


@triton.jit
def finish(
    pair,
    negative_zero,
    scale,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
):
    """The value, from integers by adding -zero, exactly; times the scale, rounded, where SCALE."""
    if CODE == "int":
        pair = add_pair(pair, negative_zero, BF16, ASM)
    if SCALE:
        return mul_pair(pair, scale, BF16, ASM)
    else:
        return pair


@triton.jit
def load_groups(
    scales_ptr, k_tile, rows, padded_n, BITS: tl.constexpr, G: tl.constexpr, COUNT: tl.constexpr
):
    """Scale words of one k tile: int32 [BN, COUNT] for columns with j16 = 0 and for the others.

    Only groups of 16 at 4 bits tell the two apart.
    """
    STEP: tl.constexpr = TILE_K // G // COUNT
    first = k_tile * (TILE_K // G) + tl.arange(0, COUNT) * STEP
    pointers = scales_ptr + first[None, :] * padded_n + rows[:, None]
    even = tl.load(pointers)
    odd = tl.load(pointers + padded_n) if STEP == 2 else even
    return even, odd


@triton.jit
def spread_scale(
    groups,
    FACTOR: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    COUNT: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
):
    """Pairs of FACTOR * scale for words [BN, 4 * BITS], from scale words [BN, COUNT].

    A zero-point in the low byte is too small to matter to the rounding, except of ties.
    """
    scale = groups.to(tl.float32, bitcast=True) * FACTOR
    return spread(make_pair(scale, BF16, ASM), BN, BITS, COUNT)


@triton.jit
def dequantise_tile(
    words,
    even,
    odd,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    BN: tl.constexpr,
    COUNT: tl.constexpr,
    SCALE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
):
    """value [* scale] as 16-bit floats [BN, 128] from words [BN, 4 * BITS].

    RESIDUAL: what code books lose to the 16 bits instead.
    """
    # E4M3 scales are small: 256 keeps them normal in float16, and saves that product.
    FOLD: tl.constexpr = SCALE and CODE == "e4m3" and not BF16
    FACTOR: tl.constexpr = 256.0 if FOLD else 1.0
    zero_even = spread(negative_zero_pair(even, BITS, BF16, ASM), BN, BITS, COUNT)
    zero_odd = spread(negative_zero_pair(odd, BITS, BF16, ASM), BN, BITS, COUNT)
    scale_even = spread_scale(even, FACTOR, BITS, BN, COUNT, BF16, ASM)
    scale_odd = spread_scale(odd, FACTOR, BITS, BN, COUNT, BF16, ASM)
    if BITS == 8:
        if CODE == "int":
            p0, p8 = unpack8(words, BF16, ASM)
        else:
            p0, p8 = unpack_float8(words, CODE, BF16, not FOLD, ASM)
        p0 = finish(p0, zero_even, scale_even, CODE, SCALE, BF16, ASM)
        p8 = finish(p8, zero_even, scale_even, CODE, SCALE, BF16, ASM)
        return arrange8(p0, p8, BN, BF16)
    else:
        if CODE == "int":
            p0, p16, p8, p24 = unpack4(words, BF16, ASM)
        else:
            p0, p16, p8, p24 = look_up(words, CODE, BF16, RESIDUAL, ASM)
        p0 = finish(p0, zero_even, scale_even, CODE, SCALE, BF16, ASM)
        p8 = finish(p8, zero_even, scale_even, CODE, SCALE, BF16, ASM)
        p16 = finish(p16, zero_odd, scale_odd, CODE, SCALE, BF16, ASM)
        p24 = finish(p24, zero_odd, scale_odd, CODE, SCALE, BF16, ASM)
        return arrange4(p0, p16, p8, p24, BN, BF16)


@triton.jit
def code_pointers(codes_ptr, rows, k_tiles, BITS: tl.constexpr):
    """Pointers [BN, 4 * BITS] to the words of `rows` in k tile 0."""
    WORDS: tl.constexpr = 4 * BITS
    row_offsets = (rows // TILE_N) * k_tiles * (TILE_N * WORDS) + (rows % TILE_N) * WORDS
    return codes_ptr + row_offsets[:, None] + tl.arange(0, WORDS)[None, :]


@triton.jit(do_not_specialize=["M", "k_tiles", "split_tiles"])
def wna16_gemm(
    x_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    k_tiles,
    split_tiles,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SCALE: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[s, m, n] = sum_{k in s} x[m, k] scale[n, g(k)] value(code[n, k]) + bias[n].

    Computed transposed, W being the register operand of the tensor cores:

                    x^T  [128, BM]
        W [BN, 128] acc  [BN,  BM]       one step of k; programs are (n, m, split)

    Without SCALE, G is 128 and the fp32 result of each step is scaled: exact weights. With it,
    the weights are scaled and rounded, and the accumulator stays in the tensor cores.

    Args:
        x_ptr: float16 or bfloat16 [M, 128 * k_tiles].
        codes_ptr: int32, `pack_codes`.
        scales_ptr: int32, `pack_scales`.
        bias_ptr: [N] or None.
        out_ptr: [splits, M, N]; float32 if there are several splits.
        split_tiles: k tiles per split, so that no split is empty.
        CODE: what a code stands for, as in `code_types`. Values of code books are rounded to the
            type of x.
        STAGES: depth of the load pipeline.
    """
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    COUNT: tl.constexpr = min(TILE_K // G, BITS)
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
    pointers = code_pointers(codes_ptr, rows, k_tiles, BITS) + first * (TILE_N * 4 * BITS)
    acc = tl.zeros((BN, BM), tl.float32)
    # With the depth given here, loads that feed no dot product are asynchronous too: the scales.
    for k_tile in tl.range(first, last, num_stages=STAGES):
        words = tl.load(pointers)
        x = tl.load(x_pointers)
        even, odd = load_groups(scales_ptr, k_tile, rows, padded_n, BITS, G, COUNT)
        w = dequantise_tile(words, even, odd, BITS, CODE, BN, COUNT, SCALE, False, BF16, ASM)
        if not ASM:  # The interpreter has no bfloat16 arithmetic.
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        if SCALE:
            acc = tl.dot(w, x, acc)
        else:
            acc += tl.dot(w, x) * scale_of(even, CODE)
        pointers += TILE_N * 4 * BITS
        x_pointers += TILE_K
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + split * M * N + tokens[None, :] * N + rows[:, None]
    inside = (tokens < M)[None, :] & (rows < N)[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_tile", "k_tiles"])
def dequantise_rows(
    codes_ptr,
    scales_ptr,
    out_ptr,
    N,
    first_tile,
    k_tiles,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    G: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[n, k] = scale[n, g(k)] value(code[n, k]), in fp32 and rounded once.

    Programs are (row tile, k tile).

    Args:
        codes_ptr: int32, `pack_codes`.
        scales_ptr: int32, `pack_scales`.
        out_ptr: [64 * row tiles, 128 * k_tiles], of any float dtype; row 0 is row 64 * first_tile.
    """
    COUNT: tl.constexpr = min(TILE_K // G, BITS)
    out_rows = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    rows = first_tile * TILE_N + out_rows
    k_tile = tl.program_id(1)
    padded_n = tl.cdiv(N, 128) * 128
    words = tl.load(code_pointers(codes_ptr, rows, k_tiles, BITS) + k_tile * (TILE_N * 4 * BITS))
    even, odd = load_groups(scales_ptr, k_tile, rows, padded_n, BITS, G, COUNT)
    values = dequantise_tile(
        words, even, odd, BITS, CODE, TILE_N, COUNT, False, False, False, ASM
    ).to(tl.float32)
    if BITS == 4 and CODE != "int":
        values += dequantise_tile(
            words, even, odd, BITS, CODE, TILE_N, COUNT, False, True, False, ASM
        ).to(tl.float32)
    columns = tl.arange(0, TILE_K)
    group_rows = scales_ptr + (k_tile * (TILE_K // G) + columns // G) * padded_n
    scale = scale_of(tl.load(group_rows[None, :] + rows[:, None]), CODE)
    out = out_ptr + out_rows[:, None].to(tl.int64) * (k_tiles * TILE_K) + k_tile * TILE_K + columns
    tl.store(out, (values * scale).to(out_ptr.dtype.element_ty))
