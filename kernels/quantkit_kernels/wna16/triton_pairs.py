# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton: arithmetic on int32 words of two 16-bit floats, a "pair".

Each primitive is one instruction, in assembly because the compiler spends two or more. The
interpreter cannot run assembly: without ASM each computes the same bits in plain Triton.
"""

import triton
import triton.language as tl

AND_OR_ASM = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0xea;")
AND_XOR_ASM = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0x6a;")
LOW_BYTE_ASM = tl.constexpr("prmt.b32 $0, $1, $2, 0x4040;")
ODD_BYTES_ASM = tl.constexpr("prmt.b32 $0, $1, $2, 0x4341;")
FMA_BF16_ASM = tl.constexpr("fma.rn.bf16x2 $0, $1, $2, $3;")
FMA_FP16_ASM = tl.constexpr("fma.rn.f16x2 $0, $1, $2, $3;")
PAIR_BF16_ASM = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $1;")
PAIR_FP16_ASM = tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")


@triton.constexpr_function
def pair_bits(value: float, bf16: bool) -> int:
    """The int32 whose halves both are `value`: 0, or exactly a normal 16-bit float."""
    if value == 0:
        return 0
    mantissa, exponent, bias = (7, 0, 127) if bf16 else (10, 0, 15)
    fraction = abs(value)
    while fraction >= 2:
        fraction, exponent = fraction / 2, exponent + 1
    while fraction < 1:
        fraction, exponent = fraction * 2, exponent - 1
    half = (exponent + bias << mantissa) + int((fraction - 1) * (1 << mantissa))
    word = (half | (0x8000 if value < 0 else 0)) * 0x10001
    return word - (word >> 31 << 32)


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
def and_xor(words, mask, magic, ASM: tl.constexpr):
    """(words & mask) ^ magic."""
    if ASM:
        return tl.inline_asm_elementwise(
            AND_XOR_ASM, "=r,r,r,r", [words, mask, magic], tl.int32, is_pure=True, pack=1
        )
    else:
        return (words & mask) ^ magic


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
def odd_bytes_pair(words, high_byte, ASM: tl.constexpr):
    """Halves: high_byte << 8 | byte 1 of a word, and the same of byte 3."""
    if ASM:
        return tl.inline_asm_elementwise(
            ODD_BYTES_ASM, "=r,r,r", [words, high_byte], tl.int32, is_pure=True, pack=1
        )
    else:
        return ((words >> 8) & 0x00FF00FF) | (high_byte << 8) | (high_byte << 24)


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
def fma_pair(a, FACTOR: tl.constexpr, c, BF16: tl.constexpr, ASM: tl.constexpr):
    """a * FACTOR + c, rounded once. FACTOR is a power of two.

    Without FACTOR = 1 there is no sum in assembly: bfloat16 has only FMA before sm_90.
    """
    if ASM:
        CODE: tl.constexpr = FMA_BF16_ASM if BF16 else FMA_FP16_ASM
        BITS: tl.constexpr = pair_bits(FACTOR, BF16)
        return tl.inline_asm_elementwise(
            CODE, "=r,r,r,r", [a, BITS, c], tl.int32, is_pure=True, pack=1
        )
    else:
        low = decode_half(a, BF16) * FACTOR + decode_half(c, BF16)
        high = decode_half(a >> 16, BF16) * FACTOR + decode_half(c >> 16, BF16)
        return encode_half(low, BF16) | (encode_half(high, BF16) << 16)


@triton.jit
def mul_pair(a, b, BF16: tl.constexpr, ASM: tl.constexpr):
    """a * b, rounded; a * b + (-0) in assembly, as for `fma_pair`."""
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
def halves(pair, BF16: tl.constexpr):
    """Words [...] of pairs to 16-bit floats [..., 2]."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    low = pair.to(tl.int16).to(dtype, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high)
