# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton arithmetic of rows: scales, rounding, codes, and where the parts of a row go."""

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
