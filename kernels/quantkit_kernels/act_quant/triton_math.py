# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Arithmetic of the activation kernel: few instructions, and the reference's bits.

ASM chooses between inline assembly and a twin in Triton's own terms, which the interpreter runs.
"""

import triton
import triton.language as tl

from quantkit_kernels.act_quant.triton_kernels import SMALLEST_SCALE, clamp, low_bits, rint

LARGEST = tl.constexpr(3.4028234663852886e38)
"""The largest float32."""


@triton.jit
def product(left, right, ASM: tl.constexpr):
    """left * right, float32, rounded by itself: no compiler fuses it with the sum that follows."""
    if ASM:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;",
            "=f,f,f",
            [left, right],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return left * right


@triton.jit
def low_bytes(bits, ASM: tl.constexpr):
    """uint8, the lowest byte of each int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 first, second;
            prmt.b32 first, $1, $2, 0x0040;
            prmt.b32 second, $3, $4, 0x0040;
            prmt.b32 $0, first, second, 0x5410;
            }""",
            "=r,r,r,r,r",
            [bits],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        return bits.to(tl.uint8)


@triton.jit
def silu(x, ASM: tl.constexpr):
    """x / (1 + exp(-x)), float32; below -87 it is 0, where its magnitude is under 2e-36.

    The constant is -log2(e).
    """
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 t, t;
            mul.f32 $0, $1, t;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def add(x, y, ASM: tl.constexpr):
    """x + y, rounded once to their dtype.

    A float32 has more than twice the bits of both 16-bit types, so rounding to it first, as the
    twin does, changes nothing. One times x plus y is the sum on GPUs that cannot add bfloat16.
    """
    if ASM and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 one;
            mov.b32 one, 0x3F803F80;
            fma.rn.bf16x2 $0, $1, one, $2;
            }""",
            "=r,r,r",
            [x, y],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif ASM and x.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;",
            "=r,r,r",
            [x, y],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)


@triton.jit
def reciprocal(x, ASM: tl.constexpr):
    """1 / x rounded to float32, for 2**-126 <= x < 2**126.

    Two Newton steps, as in the GPU's own division, whose branch for other x is left out.
    """
    if ASM:
        near = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        near = tl.fma(tl.fma(-x, near, 1.0), near, near)
        return tl.fma(tl.fma(-x, near, 1.0), near, near)
    else:
        return tl.div_rn(1.0, x)


@triton.jit
def divide(x, DIVISOR: tl.constexpr, ASM: tl.constexpr):
    """x / DIVISOR rounded to float32, where the quotient is at least 2**-126.

    By Markstein: a near quotient, and the remainder it leaves, which is exact, times a reciprocal.
    The interpreter's fma rounds twice.
    """
    if ASM:
        near = x * (1.0 / DIVISOR)
        return tl.fma(tl.fma(near, -DIVISOR, x), 1.0 / DIVISOR, near)
    else:
        return tl.div_rn(x, DIVISOR)


@triton.jit
def larger(left, right):
    """max(left, right); NaN if one is."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(left, right):
    """min(left, right); NaN if one is."""
    return tl.minimum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def any_nan(values, AXIS: tl.constexpr):
    """Whether a value is NaN, over an axis."""
    return tl.max((values != values).to(tl.int32), axis=AXIS) > 0  # noqa: PLR0124


@triton.jit
def largest(values, AXIS: tl.constexpr, ASM: tl.constexpr):
    """Maximum over an axis; NaN if a value is. The interpreter is slow with `larger`."""
    if ASM:
        return tl.reduce(values, AXIS, larger)
    else:
        return tl.where(any_nan(values, AXIS), float("nan"), tl.max(values, axis=AXIS))


@triton.jit
def smallest(values, AXIS: tl.constexpr, ASM: tl.constexpr):
    """Minimum over an axis; NaN if a value is."""
    if ASM:
        return tl.reduce(values, AXIS, smaller)
    else:
        return tl.where(any_nan(values, AXIS), float("nan"), tl.min(values, axis=AXIS))


@triton.jit
def add_and_compare(left_sum, left_largest, right_sum, right_largest):
    """The sum of the first of each pair, and the larger of the second."""
    return left_sum + right_sum, larger(left_largest, right_largest)


@triton.jit
def sum_and_largest(terms, values, ASM: tl.constexpr):
    """Sum of terms [C] and `largest` of values [C], with one exchange between warps for both."""
    if ASM:
        return tl.reduce((terms, values), 0, add_and_compare)
    else:
        return tl.sum(terms, axis=0), largest(values, 0, ASM)


@triton.jit
def symmetric_scale(most, bound, LEVELS: tl.constexpr, BOUNDED: tl.constexpr, ASM: tl.constexpr):
    """The scale that gives LEVELS codes of each sign to values of magnitude `most` and less."""
    if BOUNDED:
        most = tl.minimum(most, bound)
    return tl.maximum(divide(most, LEVELS, ASM), SMALLEST_SCALE)


@triton.jit
def shifted_scale(high, low, bound, ASM: tl.constexpr):
    """Scale and zero-point of values from low to high, which are cut to 0 and the bound."""
    high, low = clamp(high, 0.0, bound), clamp(low, -bound, 0.0)
    scale = tl.maximum(divide(high - low, 255.0, ASM), SMALLEST_SCALE)
    below = product(low, reciprocal(scale, ASM), ASM)
    return scale, rint(clamp(-128.0 - below, -128.0, 127.0))


@triton.jit
def integer_bits(scaled, zero, SYMMETRIC: tl.constexpr, CUT: tl.constexpr):
    """Bits of `low_bits` of the codes before the zero-point is added, which they leave room for.

    CUT: values may be outside the range of codes. Those that a symmetric scale was made for are
    not: they are rounded to at most 127.
    """
    if not SYMMETRIC:
        # The limits are whole numbers: cut before rounding, values cannot overflow.
        scaled = clamp(scaled, -128.0 - zero, 127.0 - zero)
    elif CUT:
        scaled = clamp(scaled, -127.0, 127.0)
    return low_bits(scaled)
