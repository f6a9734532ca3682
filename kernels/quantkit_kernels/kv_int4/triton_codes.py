# ruff: noqa: ANN001, ANN201, SIM300
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the Triton kernels of the cache share: nibbles to floats, words to scales and zero-points.

A float16 1024 + n or bfloat16 128 + n has n in its low bits, so `nibble | magic` converts without
a conversion. The compiler spends two or more instructions on what takes one, hence assembly; the
interpreter cannot run it, so without ASM each function computes the same numbers in float32.
"""

import triton
import triton.language as tl

NIBBLES_ASM = tl.constexpr("""{
    .reg .b32 even, odd;
    prmt.b32 even, $4, 0, 0x4140;
    prmt.b32 odd, $4, 0, 0x4342;
    lop3.b32 $0, even, 0x000F000F, MAGIC, 0xEA;
    lop3.b32 $1, odd, 0x000F000F, MAGIC, 0xEA;
    shr.u32 even, even, 4;
    shr.u32 odd, odd, 4;
    lop3.b32 $2, even, 0x000F000F, MAGIC, 0xEA;
    lop3.b32 $3, odd, 0x000F000F, MAGIC, 0xEA;
}""")
"""Four bytes to four 16-bit floats of their low nibbles, and four of their high ones."""

BF16_NIBBLES_ASM = tl.constexpr(NIBBLES_ASM.value.replace("MAGIC", "0x43004300"))
FP16_NIBBLES_ASM = tl.constexpr(NIBBLES_ASM.value.replace("MAGIC", "0x64006400"))

ROUND_ASM = tl.constexpr("""{
    cvt.rn.bf16x2.f32 $0, $4, $3;
    shl.b32 $1, $0, 16;
    and.b32 $2, $0, 0xFFFF0000;
}""")
"""Two floats to a pair of bfloat16, and those two as float32."""

MASKED = tl.constexpr(-1e30)
"""A logit of what is not seen: its probability is 0, and no difference of two is NaN."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def base_of(DTYPE: tl.constexpr):
    """What `nibbles` adds to a nibble: the first float of its type that counts in ones."""
    if DTYPE == tl.bfloat16:
        return 128.0
    elif DTYPE == tl.float16:
        return 1024.0
    else:
        return 0.0


@triton.jit
def nibbles(codes, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Low and high nibbles of bytes, each + base, as DTYPE; as float32 without ASM."""
    if ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            BF16_NIBBLES_ASM, "=r,=r,=r,=r,r", [codes], (tl.bfloat16, tl.bfloat16), True, 4
        )
    elif ASM and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            FP16_NIBBLES_ASM, "=r,=r,=r,=r,r", [codes], (tl.float16, tl.float16), True, 4
        )
    else:
        base = base_of(DTYPE)
        low = (codes & 0xF).to(tl.float32) + base
        high = (codes >> 4).to(tl.float32) + base
        return low, high


@triton.jit
def scale_of(words):
    """float32 scale of uint16 words."""
    return (words & 0xFFF0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def zero_of(words, DTYPE: tl.constexpr):
    """float32 zero-point of uint16 words + the base of `nibbles`, without a conversion."""
    wide = words.to(tl.int32)
    if DTYPE == tl.bfloat16:
        return (((wide << 16) & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        return (((wide << 13) & 0x0001E000) | 0x44800000).to(tl.float32, bitcast=True)
    else:
        return (wide & 0xF).to(tl.float32)


@triton.jit
def rounded(values, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """float32 values rounded to DTYPE, bfloat16 or float32: to be multiplied, and as float32."""
    if DTYPE == tl.float32:
        return values, values
    elif ASM:
        pair, bits = tl.inline_asm_elementwise(
            ROUND_ASM, "=r,=r,=r,f,f", [values], (tl.bfloat16, tl.int32), True, 2
        )
        return pair, bits.to(tl.float32, bitcast=True)
    else:
        # The interpreter's cast does not round to even.
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        near = bits.to(tl.float32, bitcast=True) + (values - values)  # NaN stays NaN
        return near, near


@triton.jit
def piece(low, high, index: tl.constexpr, COUNT: tl.constexpr):
    """Piece `index` of 2 * COUNT: first those of low nibbles, then those of high ones."""
    if index < COUNT:
        return low[index]
    else:
        return high[index - COUNT]
