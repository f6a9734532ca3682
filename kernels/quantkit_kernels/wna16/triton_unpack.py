# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels over the layout of `cuda_layout`; `triton` launches them.

Weights live in registers as int32 words of two 16-bit floats ("pairs"), a pair being two
neighbouring columns. A float16 1024 + n or bfloat16 128 + n has n in its low bits, so
`(word & mask) | magic` converts integers without a conversion, and subtracting
magic + zero is exact.

The pair primitives are one instruction each, in assembly because the compiler spends two or more.
The interpreter cannot run assembly: without ASM each computes the same bits in plain Triton.
"""

import triton
import triton.language as tl

AND_OR_ASM = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0xea;")
LOW_BYTE_ASM = tl.constexpr("prmt.b32 $0, $1, $2, 0x4040;")
FMA_BF16_ASM = tl.constexpr("fma.rn.bf16x2 $0, $1, $2, $3;")
FMA_FP16_ASM = tl.constexpr("fma.rn.f16x2 $0, $1, $2, $3;")
PAIR_BF16_ASM = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $1;")
PAIR_FP16_ASM = tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")

TILE_N = tl.constexpr(64)
TILE_K = tl.constexpr(128)


@triton.jit
def and_or(words, mask, magic, ASM: tl.constexpr):
    """(words & mask) | magic."""
    if ASM:
        return tl.inline_asm_elementwise(
            AND_OR_ASM, "=r,r,r,r", [words, mask, magic], tl.int32, is_pure=True, pack=1
        )
    else:
        return (words & mask) | magic


@triton.jit
def low_byte_pair(word, high_byte, ASM: tl.constexpr):
    """Both halves: high_byte << 8 | word & 0xFF."""
    if ASM:
        return tl.inline_asm_elementwise(
            LOW_BYTE_ASM, "=r,r,r", [word, high_byte], tl.int32, is_pure=True, pack=1
        )
    else:
        half = (word & 0xFF) | (high_byte << 8)
        return half | (half << 16)


@triton.jit
def make_pair(value, BF16: tl.constexpr, ASM: tl.constexpr):
    """Both halves: the 16-bit float nearest to an fp32 value."""
    if ASM:
        CODE: tl.constexpr = PAIR_BF16_ASM if BF16 else PAIR_FP16_ASM
        return tl.inline_asm_elementwise(CODE, "=r,f", [value], tl.int32, is_pure=True, pack=1)
    else:
        half = encode_half(value, BF16)
        return half | (half << 16)


@triton.jit
def add_pair(a, b, BF16: tl.constexpr, ASM: tl.constexpr):
    """a + b, rounded; a * 1 + b in assembly, since bfloat16 has only FMA before sm_90."""
    if ASM:
        CODE: tl.constexpr = FMA_BF16_ASM if BF16 else FMA_FP16_ASM
        ONE: tl.constexpr = 0x3F803F80 if BF16 else 0x3C003C00
        return tl.inline_asm_elementwise(
            CODE, "=r,r,r,r", [a, ONE, b], tl.int32, is_pure=True, pack=1
        )
    else:
        low = decode_half(a, BF16) + decode_half(b, BF16)
        high = decode_half(a >> 16, BF16) + decode_half(b >> 16, BF16)
        return encode_half(low, BF16) | (encode_half(high, BF16) << 16)


@triton.jit
def mul_pair(a, b, BF16: tl.constexpr, ASM: tl.constexpr):
    """a * b, rounded; a * b + (-0) in assembly, as for `add_pair`."""
    if ASM:
        CODE: tl.constexpr = FMA_BF16_ASM if BF16 else FMA_FP16_ASM
        MINUS_ZERO: tl.constexpr = -0x7FFF8000
        return tl.inline_asm_elementwise(
            CODE, "=r,r,r,r", [a, b, MINUS_ZERO], tl.int32, is_pure=True, pack=1
        )
    else:
        low = decode_half(a, BF16) * decode_half(b, BF16)
        high = decode_half(a >> 16, BF16) * decode_half(b >> 16, BF16)
        return encode_half(low, BF16) | (encode_half(high, BF16) << 16)


@triton.jit
def decode_half(bits, BF16: tl.constexpr):
    """fp32 value of the 16-bit float in the low half of an int32; interpreter only."""
    if BF16:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def encode_half(value, BF16: tl.constexpr):
    """The 16-bit float nearest to an fp32 value, in the low half of an int32; interpreter only."""
    if BF16:
        # The interpreter's cast does not round to even.
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    else:
        return value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def scale_of(word, CODE: tl.constexpr):
    """fp32 scale of a word of `pack_scales`."""
    if CODE == "int":
        word &= -256
    return word.to(tl.float32, bitcast=True)


@triton.jit
def negative_zero_pair(word, BITS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """What turns the output of `unpack` into code - zero when added: -(magic + zero), as a pair."""
    if BITS == 8 and BF16:
        # `unpack` has subtracted 128 already. 0x4B000000 | n is 2**23 + n in fp32.
        zero = ((word & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)
        return make_pair(8388736.0 - zero, BF16, ASM)
    else:
        return low_byte_pair(word, 0xC3 if BF16 else 0xE4, ASM)


@triton.jit
def unpack4(words, BF16: tl.constexpr, ASM: tl.constexpr):
    """Pairs of magic + code: columns +0, +16, +8 and +24 of each word, with the column after."""
    MAGIC: tl.constexpr = 0x43004300 if BF16 else 0x64006400
    return (
        and_or(words, 0x000F000F, MAGIC, ASM),
        and_or(words >> 4, 0x000F000F, MAGIC, ASM),
        and_or(words >> 8, 0x000F000F, MAGIC, ASM),
        and_or(words >> 12, 0x000F000F, MAGIC, ASM),
    )


@triton.jit
def byte_pair(words, BF16: tl.constexpr, ASM: tl.constexpr):
    """Pair of the even bytes c = code - 128: bfloat16 c, or float16 1024 + code.

    bfloat16 has 8 significant bits: c = (128 + (c & 127)) - (c < 0 ? 256 : 128), each exact.
    """
    if BF16:
        low = and_or(words, 0x007F007F, 0x43004300, ASM)
        minus = and_or(words, 0x00800080, -0x3CFF3D00, ASM)  # 0xC300C300: -128, -128
        return add_pair(low, minus, BF16, ASM)
    else:
        return and_or(words ^ 0x00800080, 0x00FF00FF, 0x64006400, ASM)


@triton.jit
def unpack8(words, BF16: tl.constexpr, ASM: tl.constexpr):
    """Pairs as of `byte_pair`: columns +0 and +8 of each word, with the column after."""
    return byte_pair(words, BF16, ASM), byte_pair(words >> 8, BF16, ASM)


@triton.jit
def spread(groups, BN: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Group values [BN, COUNT] to words [BN, 4 * BITS], whose order is (h, t, v)."""
    H: tl.constexpr = BITS // 4
    if COUNT == 1:
        return tl.broadcast_to(groups, (BN, 16 * H))
    else:
        V: tl.constexpr = COUNT // H
        split = tl.reshape(groups, (BN, H, 1, V, 1))
        return tl.reshape(tl.broadcast_to(split, (BN, H, 4, V, 4 // V)), (BN, 16 * H))


@triton.jit
def halves(pair, BF16: tl.constexpr):
    """Words [...] of pairs to 16-bit floats [..., 2]."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    low = pair.to(tl.int16).to(dtype, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def arrange4(p0, p16, p8, p24, BN: tl.constexpr, BF16: tl.constexpr):
    """Pairs [BN, (t, v)] to columns [BN, 128] = (v, j16, j8, t, b): no instruction, see layout."""
    even = tl.join(halves(p0, BF16), halves(p16, BF16))
    odd = tl.join(halves(p8, BF16), halves(p24, BF16))
    split = tl.reshape(tl.join(even, odd), (BN, 4, 4, 2, 2, 2))  # n, t, v, b, j16, j8
    return tl.reshape(tl.permute(split, (0, 2, 4, 5, 1, 3)), (BN, TILE_K))


@triton.jit
def arrange8(p0, p8, BN: tl.constexpr, BF16: tl.constexpr):
    """Pairs [BN, (h, t, v)] to columns [BN, 128] = (h, v, j8, t, b): no instruction either."""
    joined = tl.join(halves(p0, BF16), halves(p8, BF16))
    split = tl.reshape(joined, (BN, 2, 4, 4, 2, 2))  # n, h, t, v, b, j8
    return tl.reshape(tl.permute(split, (0, 1, 3, 5, 2, 4)), (BN, TILE_K))
