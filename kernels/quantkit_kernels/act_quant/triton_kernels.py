# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel: one row of x, of its norm or of silu(gate) * up, quantised in registers."""

import triton
import triton.language as tl

ROUND_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)
"""float32 of this size count in ones: a sum with it is an integer, rounded half to even."""

SMALLEST_SCALE = tl.constexpr(2.0**-126)
INFINITY_BITS = tl.constexpr(0x7F800000)
MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def low_bits(value):
    """int32 whose lowest 22 bits are those of rint(value), half to even, for |value| < 2**21."""
    return (value + ROUND_TO_INTEGER).to(tl.int32, bitcast=True)


@triton.jit
def rint(value):
    """The nearest integer as float32, half to even, for |value| < 2**21."""
    return (value + ROUND_TO_INTEGER) - ROUND_TO_INTEGER


@triton.jit
def clamp(value, low, high):
    """min(max(value, low), high)."""
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def to_e4m3(value, CONVERT: tl.constexpr):
    """The bits of the nearest E4M3 as uint8, half to even, for |value| <= 448.

    CONVERT: by the GPU's instruction. Else: E4M3 counts in steps of 2**(E - 3), E the exponent of
    the value, at least -6. float32 of the size of 2**(E + 20) counts in the same: the sum with that
    number is rounded to steps, and its lowest bits are their number n. The code is 8 (E + 6) + n.
    """
    if CONVERT:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = bits & MAGNITUDE_BITS
        exponent = tl.maximum(magnitude & INFINITY_BITS, (127 - 6) << 23)
        ones = exponent + (20 << 23)
        total = magnitude.to(tl.float32, bitcast=True) + ones.to(tl.float32, bitcast=True)
        steps = total.to(tl.int32, bitcast=True) - ones
        code = steps + (exponent >> 20) - ((127 - 6) << 3)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def row_values(
    x,
    residual,
    weight_ptr,
    total,
    columns,
    inside,
    width,
    epsilon,
    KIND: tl.constexpr,
):
    """What is quantised, float32 [G, S]; x, residual and total are addresses of a row."""
    values = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if KIND == "silu_mul":
        up = tl.load(x + width + columns, mask=inside, other=0.0).to(tl.float32)
        values = values / (1.0 + tl.exp(-values)) * up
    if KIND == "add_norm":
        values += tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)
        stored = values.to(total.dtype.element_ty)
        tl.store(total + columns, stored, mask=inside)
        values = stored.to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(tl.sum(values * values, axis=1), axis=0), width.to(tl.float32))
        values = values * tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon)) * weight
    return values


@triton.jit
def dynamic_scale(values, bits, bound, E4M3: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scales [G] that cover the range of values [G, S], and zero-points [G].

    bits: int32 [G], those of the largest magnitudes.
    """
    if SYMMETRIC:
        largest = tl.minimum(bits.to(tl.float32, bitcast=True), bound)
        scale = tl.maximum(tl.div_rn(largest, 448.0 if E4M3 else 127.0), SMALLEST_SCALE)
        return scale, tl.zeros_like(scale)
    else:
        high = clamp(tl.max(values, axis=1), 0.0, bound)
        low = clamp(tl.min(values, axis=1), -bound, 0.0)
        scale = tl.maximum(tl.div_rn(high - low, 255.0), SMALLEST_SCALE)
        # Cut to its range, so that the product is rounded before it is subtracted.
        below = clamp(low * tl.div_rn(1.0, scale), -255.0, 0.0)
        return scale, rint(clamp(-128.0 - below, -128.0, 127.0))


@triton.jit
def to_codes(scaled, zero, E4M3: tl.constexpr, SYMMETRIC: tl.constexpr, CONVERT: tl.constexpr):
    """uint8 [G, S], the bits of the codes of scaled [G, S] with zero-points [G]."""
    if E4M3:
        return to_e4m3(clamp(scaled, -448.0, 448.0), CONVERT)
    elif SYMMETRIC:
        return low_bits(clamp(scaled, -127.0, 127.0)).to(tl.uint8)
    else:
        zeros = zero[:, None]
        # The limits are whole numbers: cut before rounding, values cannot overflow.
        code = low_bits(clamp(scaled, -128.0 - zeros, 127.0 - zeros))
        return (code + zeros.to(tl.int32)).to(tl.uint8)


@triton.jit
def store_scales(words, scale, zero, groups, words_per_row, G: tl.constexpr):
    """Write scales [G], the zero-point of the first group, and 0 up to the end of the row."""
    index = tl.arange(0, G)
    tl.store(words + index, scale, mask=index < groups)
    rest = tl.arange(0, 4)
    first = tl.sum(tl.where(index == 0, zero, 0.0), axis=0)
    tl.store(words + groups + rest, tl.where(rest == 0, first, 0.0), groups + rest < words_per_row)


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
    width,
    x_stride,
    residual_stride,
    row_stride,
    groups,
    epsilon,
    bound,
    KIND: tl.constexpr,
    E4M3: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CONVERT: tl.constexpr,
    RAGGED: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
):
    """Rows of x, of its norm, of the norm of x + residual, or of silu(gate) * up.

    A program makes a row: G groups of S channels, which cover it, in registers.

    Args:
        x_ptr: [M, K], or [M, 2 K] for "silu_mul".
        residual_ptr, total_ptr: [M, K] for "add_norm", or None.
        weight_ptr: [K] for norms, or None.
        scale_ptr, zero_ptr: float32 [1], or None where scales are made.
        rows_ptr: uint8 [M, row_stride], written; words_ptr is the same memory as float32.
        width: K.
        groups: scales of a row, at most G.
        RAGGED: K is no multiple of 16, so that codes are padded.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, G)[:, None] * S + tl.arange(0, S)[None, :]
    inside = columns < width
    residual = None if residual_ptr is None else residual_ptr + row * residual_stride
    total = None if total_ptr is None else total_ptr + row * width
    x = x_ptr + row * x_stride
    values = row_values(x, residual, weight_ptr, total, columns, inside, width, epsilon, KIND)
    # As integers, the bits of NaN are above infinity's, and those above any number's.
    bits = tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE_BITS, axis=1)
    if scale_ptr is None:
        scale, zero = dynamic_scale(values, bits, bound, E4M3, SYMMETRIC)
    else:
        scale = tl.zeros((G,), tl.float32) + tl.load(scale_ptr)
        zero = tl.zeros((G,), tl.float32)
        if zero_ptr is not None:
            zero += tl.load(zero_ptr)
    scale = tl.where(bits < INFINITY_BITS, scale, float("nan"))
    codes = to_codes(values * tl.div_rn(1.0, scale)[:, None], zero, E4M3, SYMMETRIC, CONVERT)
    scales_at = tl.cdiv(width, 16) * 16
    if RAGGED:
        codes = tl.where(inside, codes, 0)
    tl.store(rows_ptr + row * row_stride + columns, codes, mask=columns < scales_at)
    words = words_ptr + row * (row_stride // 4) + scales_at // 4
    store_scales(words, scale, zero, groups, (row_stride - scales_at) // 4, G)
