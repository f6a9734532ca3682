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

PAIRS_ASM = tl.constexpr("""{
    .reg .b32 shifted;
    lop3.b32 $0, $4, 0x000F000F, MAGIC, 0xEA;
    shr.u32 shifted, $4, 4;
    lop3.b32 $1, shifted, 0x000F000F, MAGIC, 0xEA;
    shr.u32 shifted, $4, 8;
    lop3.b32 $2, shifted, 0x000F000F, MAGIC, 0xEA;
    shr.u32 shifted, $4, 12;
    lop3.b32 $3, shifted, 0x000F000F, MAGIC, 0xEA;
}""")
"""Two pairs of bytes to four pairs of 16-bit floats: of each pair's nibbles, from the lowest on."""

BF16_PAIRS_ASM = tl.constexpr(PAIRS_ASM.value.replace("MAGIC", "0x43004300"))
FP16_PAIRS_ASM = tl.constexpr(PAIRS_ASM.value.replace("MAGIC", "0x64006400"))

SCALES_ASM = tl.constexpr("""{
    .reg .b32 cleared;
    .reg .b16 low, high;
    and.b32 cleared, $2, 0xFFF0FFF0;
    mov.b32 {low, high}, cleared;
    cvt.f32.f16 $0, low;
    cvt.f32.f16 $1, high;
}""")
"""Two words to their scales."""

BF16_ZEROS_ASM = tl.constexpr("""{
    .reg .b32 both;
    lop3.b32 both, $2, 0x000F000F, 0x43004300, 0xEA;
    shl.b32 $0, both, 16;
    and.b32 $1, both, 0xFFFF0000;
}""")
FP16_ZEROS_ASM = tl.constexpr("""{
    .reg .b32 both;
    .reg .b16 low, high;
    lop3.b32 both, $2, 0x000F000F, 0x64006400, 0xEA;
    mov.b32 {low, high}, both;
    cvt.f32.f16 $0, low;
    cvt.f32.f16 $1, high;
}""")
"""Two words to their zero-points + base, as float32."""

ZERO_PAIRS_ASM = tl.constexpr("""{
    .reg .b32 both;
    prmt.b32 both, $2, $3, 0x5410;
    lop3.b32 $0, both, 0x000F000F, 0x43004300, 0xEA;
    prmt.b32 both, $2, $3, 0x7632;
    lop3.b32 $1, both, 0x000F000F, 0x43004300, 0xEA;
}""")
"""Two times two words to their zero-points + 128, as bfloat16: of first words, of second ones."""

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
def pair_nibbles(pairs, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Low and high nibbles of bytes, each + base, as DTYPE; as float32 without ASM.

    Args:
        pairs: uint16 [M, C], two bytes each.

    Returns:
        Tiles [M, C] of first bytes' low and high nibbles, of second bytes' low and high ones.
    """
    if ASM and DTYPE == tl.bfloat16:
        low, high, odd_low, odd_high = tl.inline_asm_elementwise(
            BF16_PAIRS_ASM, "=r,=r,=r,=r,r", [pairs], (tl.bfloat16,) * 4, True, 2
        )
    elif ASM and DTYPE == tl.float16:
        low, high, odd_low, odd_high = tl.inline_asm_elementwise(
            FP16_PAIRS_ASM, "=r,=r,=r,=r,r", [pairs], (tl.float16,) * 4, True, 2
        )
    else:
        base = base_of(DTYPE)
        low = (pairs & 0xF).to(tl.float32) + base
        high = ((pairs >> 4) & 0xF).to(tl.float32) + base
        odd_low = ((pairs >> 8) & 0xF).to(tl.float32) + base
        odd_high = (pairs >> 12).to(tl.float32) + base
    return low, high, odd_low, odd_high


@triton.jit
def scale_of(words):
    """float32 scale of uint16 words."""
    return (words & 0xFFF0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scales_of(words, ASM: tl.constexpr):
    """float32 scales of first and of second words, uint32 holding two each."""
    if ASM:
        even, odd = tl.inline_asm_elementwise(
            SCALES_ASM, "=f,=f,r", [words], (tl.float32, tl.float32), True, 1
        )
    else:
        even, odd = scale_of(words.to(tl.uint16)), scale_of((words >> 16).to(tl.uint16))
    return even, odd


@triton.jit
def zeros_of(words, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """float32 zero-points + the base of `nibbles`, as `scales_of`."""
    if ASM and DTYPE == tl.bfloat16:
        even, odd = tl.inline_asm_elementwise(
            BF16_ZEROS_ASM, "=r,=r,r", [words], (tl.float32, tl.float32), True, 1
        )
    elif ASM and DTYPE == tl.float16:
        even, odd = tl.inline_asm_elementwise(
            FP16_ZEROS_ASM, "=f,=f,r", [words], (tl.float32, tl.float32), True, 1
        )
    else:
        base = base_of(DTYPE)
        even = (words & 0xF).to(tl.float32) + base
        odd = ((words >> 16) & 0xF).to(tl.float32) + base
    return even, odd


@triton.jit
def zero_rows(words, ROWS: tl.constexpr, ASM: tl.constexpr):
    """Zero-points + 128 as `scales_of`, but bfloat16 [ROWS, C] of equal rows."""
    if ASM:
        even, odd = tl.inline_asm_elementwise(
            ZERO_PAIRS_ASM, "=r,=r,r,r", [words], (tl.bfloat16, tl.bfloat16), True, 2
        )
    else:
        even = (words & 0xF).to(tl.float32) + 128.0
        odd = ((words >> 16) & 0xF).to(tl.float32) + 128.0
    SHAPE: tl.constexpr = (ROWS, words.shape[0])
    return tl.broadcast_to(even[None, :], SHAPE), tl.broadcast_to(odd[None, :], SHAPE)


@triton.jit
def rounded(values, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """float32 values rounded to DTYPE, bfloat16 or float32; as float32 without ASM."""
    if DTYPE == tl.float32:
        return values
    elif ASM:
        return values.to(DTYPE)
    else:
        # The interpreter's cast does not round to even.
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True) + (values - values)  # NaN stays NaN
