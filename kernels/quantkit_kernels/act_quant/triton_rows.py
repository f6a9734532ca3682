# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel: one row of x, of its norm or of silu(gate) * up, quantised in registers."""

import triton
import triton.language as tl

from quantkit_kernels.act_quant.triton_kernels import clamp, to_e4m3
from quantkit_kernels.act_quant.triton_math import (
    LARGEST,
    integer_bits,
    larger,
    largest,
    low_bytes,
    product,
    reciprocal,
    shifted_scale,
    smallest,
    sum_and_largest,
    symmetric_scale,
)
from quantkit_kernels.act_quant.triton_read import read_row, store

ONES_BITS = tl.constexpr(0x4B400000)
"""What `low_bits` adds to an integer."""


@triton.jit
def norm_and_range(
    squares,
    high,
    low,
    epsilon,
    NORM: tl.constexpr,
    RANGE: tl.constexpr,
    WIDTH: tl.constexpr,
    ASM: tl.constexpr,
):
    """1 / sqrt(mean(x^2) + epsilon), or 1 without a norm, and the range of a row that it scales.

    squares, high, low: what `read_row` has seen.
    """
    factor = 1.0
    if NORM and RANGE == "none":
        factor = tl.rsqrt(tl.sum(squares, axis=0) * (1.0 / WIDTH) + epsilon)
    elif NORM:
        square, high = sum_and_largest(squares, high, ASM)
        factor = tl.rsqrt(square * (1.0 / WIDTH) + epsilon)
    elif RANGE != "none":
        high = largest(high, 0, ASM)
    low = smallest(low, 0, ASM) if RANGE == "both" else high
    return factor, high * factor, low * factor


@triton.jit
def row_scale(
    high,
    low,
    scale_ptr,
    zero_ptr,
    bound,
    RANGE: tl.constexpr,
    LEVELS: tl.constexpr,
    BOUNDED: tl.constexpr,
    ASM: tl.constexpr,
):
    """The given scale and zero-point, or those of values from low to high."""
    zero = tl.full((), 0.0, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr)
    elif RANGE == "both":
        scale, zero = shifted_scale(high, low, bound, ASM)
    else:
        scale = symmetric_scale(high, bound, LEVELS, BOUNDED, ASM)
    return scale, zero


@triton.jit
def nan_unless_finite(scale, most):
    """scale, or NaN where the largest magnitude is no number."""
    return tl.where(most < float("inf"), scale, float("nan"))


@triton.jit
def multiplier(scale, factor, ASM: tl.constexpr):
    """factor / scale, finite, so that a row of zeros has codes of 0."""
    return tl.minimum(reciprocal(scale, ASM) * factor, LARGEST)


@triton.jit
def group_scales(
    words,
    values,
    first,
    factor,
    bound,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    LEVELS: tl.constexpr,
    BOUNDED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Write the scales of the groups of values [C] times the factor; returns their `multiplier`.

    first: groups before these, of the GROUPS of the row.
    """
    COUNT: tl.constexpr = values.shape[0] // GROUP
    magnitudes = tl.abs(tl.reshape(values, (COUNT, GROUP)))
    most = largest(magnitudes, 1, ASM) * factor
    scales = symmetric_scale(most, bound, LEVELS, BOUNDED, ASM)
    stored = nan_unless_finite(scales, most).to(tl.int32, bitcast=True)
    store(words, first + tl.arange(0, COUNT), stored, GROUPS, first + COUNT <= GROUPS)
    return multiplier(scales, factor, ASM)


@triton.jit
def spread(factors, values, GROUP: tl.constexpr, ASM: tl.constexpr):
    """values [C] times the factor of their group; GROUP 0: one factor."""
    if GROUP:
        grouped = tl.reshape(values, (values.shape[0] // GROUP, GROUP))
        return tl.reshape(product(grouped, factors[:, None], ASM), values.shape)
    else:
        return product(values, factors, ASM)


@triton.jit
def to_codes(
    scaled,
    zero,
    E4M3: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CUT: tl.constexpr,
    CONVERT: tl.constexpr,
    ASM: tl.constexpr,
):
    """The codes of scaled [C] as uint8, and their `integer_bits` where they are integers."""
    if E4M3:
        # The GPU's own conversion cuts to +-448.
        codes = to_e4m3(scaled if CONVERT else clamp(scaled, -448.0, 448.0), CONVERT)
        bits = codes
    else:
        bits = integer_bits(scaled, zero, SYMMETRIC, CUT)
        codes = low_bytes(bits if SYMMETRIC else bits + zero.to(tl.int32), ASM)
    return codes, bits


@triton.jit
def store_sums(
    sums,
    integers,
    zero,
    first,
    WIDTH: tl.constexpr,
    SUM_GROUP: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Write the sums of codes that are integers [C] and zero.

    first: sums before these, of the SUMS of the row.
    """
    COUNT: tl.constexpr = integers.shape[0] // SUM_GROUP
    number = first + tl.arange(0, COUNT)
    inside = clamp(WIDTH - number * SUM_GROUP, 0, SUM_GROUP)
    made = tl.sum(tl.reshape(integers, (COUNT, SUM_GROUP)), axis=1)
    store(sums, number, made + inside * zero.to(tl.int32), SUMS, first + COUNT <= SUMS)


@triton.jit
def sum_of_row(seen, zero, WIDTH: tl.constexpr, SUMS: tl.constexpr):
    """The sum of a row's codes, where it has one; seen: int32 [C], of all chunks, without zero."""
    total = tl.full((), 0, tl.int32)
    if SUMS == 1:
        total = tl.sum(seen, axis=0) + WIDTH * zero.to(tl.int32)
    return total


@triton.jit
def store_ends(
    words,
    scale,
    zero,
    total,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SUMS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Write the zero-point, the scale and the sum where there is one, and 0 up to the row's end."""
    rest = tl.arange(0, 4)
    scale, zero = scale.to(tl.int32, bitcast=True), zero.to(tl.int32, bitcast=True)
    if GROUP == 0 and SUMS <= 1:
        ends = tl.where(rest == 0, scale, tl.where(rest == 1, zero, 0))
        tl.store(words + rest, tl.where(rest == 2, total, ends))
    else:
        if GROUP == 0:
            tl.store(words, scale)
        tl.store(words + GROUPS, zero)
        if SUMS == 1:
            tl.store(words + GROUPS + 1, total)
        position = GROUPS + 1 + SUMS + rest
        tl.store(words + position, tl.zeros((4,), tl.int32), mask=position < WORDS)


@triton.jit
def quantise_row(
    x_ptr,
    residual_ptr,
    weight_ptr,
    total_ptr,
    scale_ptr,
    zero_ptr,
    rows_ptr,
    words_ptr,
    x_stride,
    residual_stride,
    epsilon,
    bound,
    KIND: tl.constexpr,
    E4M3: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BOUNDED: tl.constexpr,
    CONVERT: tl.constexpr,
    ASM: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    SUM_GROUP: tl.constexpr,
    ROW: tl.constexpr,
    C: tl.constexpr,
):
    """Rows of x, of its norm, of the norm of x + residual, or of silu(gate) * up.

    A program makes a row, C channels at a time, and keeps x * weight in registers: 1 / sqrt(mean)
    of a norm is a factor of the scale, so that one exchange between warps finds both.

    Args:
        x_ptr: [M, K], or [M, 2 K] for "silu_mul".
        residual_ptr, total_ptr: [M, K] for "add_norm", or None.
        weight_ptr: [K] for norms, or None.
        scale_ptr, zero_ptr: float32 [1], or None where scales are made.
        rows_ptr: uint8 [M, ROW], written; words_ptr is the same memory as int32.
        BOUNDED: scales are made for magnitudes up to `bound`.
        CONVERT: the GPU itself converts to E4M3.
        WIDTH: K.
        GROUP: channels that share a scale, a power of two up to C; 0: a whole row.
        SUM_GROUP: channels of a sum of codes, a power of two up to C, or K; 0: no sums.
    """
    row = tl.program_id(0).to(tl.int64)
    STEPS: tl.constexpr = (WIDTH + C - 1) // C
    CODES: tl.constexpr = (WIDTH + 15) // 16 * 16
    GROUPS: tl.constexpr = (WIDTH + GROUP - 1) // GROUP if GROUP else 1
    SUMS: tl.constexpr = (WIDTH + SUM_GROUP - 1) // SUM_GROUP if SUM_GROUP else 0
    LEVELS: tl.constexpr = 448.0 if E4M3 else 127.0
    STATIC: tl.constexpr = scale_ptr is not None
    RANGE: tl.constexpr = "none" if GROUP else "magnitude" if SYMMETRIC or STATIC else "both"
    residual = None if residual_ptr is None else residual_ptr + row * residual_stride
    total = None if total_ptr is None else total_ptr + row * WIDTH
    codes = rows_ptr + row * ROW
    words = words_ptr + row * (ROW // 4) + CODES // 4

    chunks, squares, high, low = read_row(
        x_ptr + row * x_stride, residual, total, weight_ptr, KIND, RANGE, WIDTH, C, ASM
    )
    factor, high, low = norm_and_range(
        squares, high, low, epsilon, weight_ptr is not None, RANGE, WIDTH, ASM
    )
    zero = tl.full((), 0.0, tl.float32)
    stored_scale = zero
    if GROUP == 0:
        scale, zero = row_scale(high, low, scale_ptr, zero_ptr, bound, RANGE, LEVELS, BOUNDED, ASM)
        stored_scale = nan_unless_finite(scale, larger(high, -low) if RANGE == "both" else high)
        inverse = multiplier(scale, factor, ASM)

    seen = tl.zeros((C,), tl.int32)
    for i in tl.static_range(STEPS):
        columns = i * C + tl.arange(0, C)
        if GROUP:
            inverse = group_scales(
                words,
                chunks[i],
                i * (C // GROUP),
                factor,
                bound,
                GROUP,
                GROUPS,
                LEVELS,
                BOUNDED,
                ASM,
            )
        scaled = spread(inverse, chunks[i], GROUP, ASM)
        made, bits = to_codes(scaled, zero, E4M3, SYMMETRIC, BOUNDED or STATIC, CONVERT, ASM)
        if SUMS > 1:
            first = i * (C // SUM_GROUP)
            integers = bits - ONES_BITS
            store_sums(words + GROUPS + 1, integers, zero, first, WIDTH, SUM_GROUP, SUMS)
        elif SUMS == 1:
            seen += bits - ONES_BITS
        if WIDTH % 16:
            made = tl.where(columns < WIDTH, made, 0)
        store(codes, columns, made, CODES, (i + 1) * C <= CODES)
    total_sum = sum_of_row(seen, zero, WIDTH, SUMS)
    store_ends(words, stored_scale, zero, total_sum, GROUP, GROUPS, SUMS, (ROW - CODES) // 4)
