# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton: words of the layout of `cuda_layout` to 16-bit floats where tensor cores read them.

A float16 1024 + n or bfloat16 128 + n has n in its low bits, so `(word & mask) | magic` converts
integers without a conversion. A code some bits further up counts 2**bits or a power of it more,
which saves a shift: `code = pair / factor - magic / factor` is one FMA, and exact. Pairs of a word
are numbered from its lowest bits; each is two neighbouring columns.
"""

import triton
import triton.language as tl

from quantkit_kernels.wna16.triton_pairs import (
    and_or,
    and_xor,
    fma_pair,
    halves,
    low_byte_pair,
    make_pair,
    odd_bytes_pair,
    pair_bits,
)

TILE_N = tl.constexpr(128)
TILE_K = tl.constexpr(128)


@triton.constexpr_function
def window(bits: int, bf16: bool) -> int:
    """Codes of a half word that fit into the low bits of a 16-bit float, 7 or 10 wide."""
    return max(1, (7 if bf16 else 8) // bits) if bits < 8 else 1


@triton.constexpr_function
def factor_of(pair: int, bits: int, bf16: bool) -> int:
    """How much more than its code a pair of `unpack` counts."""
    inside: int = pair % window(bits, bf16)
    return 1 << bits * inside


@triton.constexpr_function
def offset_of(bits: int, bf16: bool) -> int:
    """What a pair of `unpack` is when its code is 0."""
    if bf16:
        return -128 if bits == 8 else 128
    return 1024


@triton.constexpr_function
def is_value(bits: int, bf16: bool, zero: int | None) -> bool:
    """Whether a pair of `unpack` is code - zero as it stands: if symmetric, with 8 bits."""
    offset: int = offset_of(bits, bf16)
    return zero is not None and offset == -zero


@triton.jit
def scale_of(word, CODE: tl.constexpr):
    """fp32 scale of a word of `pack_scales`."""
    if CODE == "int":
        word &= -256
    return word.to(tl.float32, bitcast=True)


@triton.jit
def negative_zero_pair(
    word,
    FACTOR: tl.constexpr,
    BITS: tl.constexpr,
    BF16: tl.constexpr,
    ZERO: tl.constexpr,
    ASM: tl.constexpr,
):
    """-(offset / FACTOR + zero) as a pair; zero is ZERO, or where that is None, in `word`."""
    OFFSET: tl.constexpr = offset_of(BITS, BF16)
    if ZERO is not None:
        return tl.full(word.shape, pair_bits(-OFFSET / FACTOR - ZERO, BF16), tl.int32)
    elif OFFSET < 0:
        # 0x4B000000 | n is 2**23 + n in fp32.
        zero = ((word & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)
        return make_pair((8388608.0 - OFFSET) - zero, BF16, ASM)
    else:
        whole = low_byte_pair(word, 0xC3 if BF16 else 0xE4, ASM)
        if FACTOR == 1:
            return whole
        else:
            REST: tl.constexpr = pair_bits(OFFSET - OFFSET / FACTOR, BF16)
            return fma_pair(whole, 1.0, tl.full(word.shape, REST, tl.int32), BF16, ASM)


@triton.jit
def window_pair(
    words, PAIR: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr
):
    """Pair number PAIR of each word: offset + factor * code."""
    INSIDE: tl.constexpr = PAIR % window(BITS, BF16)
    MASK: tl.constexpr = (2**BITS - 1 << BITS * INSIDE) * 0x10001
    MAGIC: tl.constexpr = 0x43004300 if BF16 else 0x64006400
    return and_or(words >> BITS * (PAIR - INSIDE), MASK, MAGIC, ASM)


@triton.jit
def byte_pair(words, BF16: tl.constexpr, ASM: tl.constexpr):
    """Pair of the even bytes: bfloat16 code - 128, or float16 1024 + code.

    bfloat16 has 8 significant bits: code - 128 = (128 + (code & 127)) - (code < 128 ? 256 : 128),
    each exact.
    """
    if BF16:
        low = and_or(words, 0x007F007F, 0x43004300, ASM)
        minus = and_xor(words, 0x00800080, -0x3C7F3C80, ASM)  # 0xC380C380: -256, -256
        return fma_pair(low, 1.0, minus, BF16, ASM)
    else:
        return and_or(words, 0x00FF00FF, 0x64006400, ASM)


@triton.jit
def unpack(words, BITS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """Pairs offset + factor * code of integers, from the lowest bits up: 16 / BITS of each word."""
    if BITS == 8:
        if BF16:
            return byte_pair(words, BF16, ASM), byte_pair(words >> 8, BF16, ASM)
        else:
            return byte_pair(words, BF16, ASM), odd_bytes_pair(words, 0x64, ASM)
    elif BITS == 4:
        return (
            window_pair(words, 0, 4, BF16, ASM),
            window_pair(words, 1, 4, BF16, ASM),
            window_pair(words, 2, 4, BF16, ASM),
            window_pair(words, 3, 4, BF16, ASM),
        )
    else:
        return (
            window_pair(words, 0, 2, BF16, ASM),
            window_pair(words, 1, 2, BF16, ASM),
            window_pair(words, 2, 2, BF16, ASM),
            window_pair(words, 3, 2, BF16, ASM),
            window_pair(words, 4, 2, BF16, ASM),
            window_pair(words, 5, 2, BF16, ASM),
            window_pair(words, 6, 2, BF16, ASM),
            window_pair(words, 7, 2, BF16, ASM),
        )


@triton.jit
def spread(groups, BN: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Group values [BN, COUNT] to words [BN, 4 * BITS], whose order is (h, t, v)."""
    H: tl.constexpr = max(BITS // 4, 1)
    if COUNT == 1:
        return tl.broadcast_to(groups, (BN, 4 * BITS))
    else:
        V: tl.constexpr = COUNT // H
        split = tl.reshape(groups, (BN, H, 1, V, 1))
        return tl.reshape(tl.broadcast_to(split, (BN, H, 4, V, BITS // H // V)), (BN, 4 * BITS))


@triton.jit
def arrange(pairs, BN: tl.constexpr, BITS: tl.constexpr, QUADS: tl.constexpr, BF16: tl.constexpr):
    """Pairs [BN, 4 * BITS] of words to columns [BN, 128]: no instruction, see `cuda_layout`.

    QUADS: j counts columns 2 apart, not 8.
    """
    if BITS == 8:
        joined = tl.join(halves(pairs[0], BF16), halves(pairs[1], BF16))
        split = tl.reshape(joined, (BN, 2, 4, 4, 2, 2))  # n, h, t, v, b, j
        columns = (
            tl.permute(split, (0, 1, 3, 2, 5, 4))
            if QUADS
            else tl.permute(split, (0, 1, 3, 5, 2, 4))
        )
    elif BITS == 4:
        joined = join_four(pairs[0], pairs[1], pairs[2], pairs[3], BF16)
        split = tl.reshape(joined, (BN, 4, 4, 2, 2, 2))  # n, t, v, b, j16, j
        columns = (
            tl.permute(split, (0, 2, 4, 1, 5, 3))
            if QUADS
            else tl.permute(split, (0, 2, 4, 5, 1, 3))
        )
    else:
        even = join_four(pairs[0], pairs[1], pairs[2], pairs[3], BF16)
        odd = join_four(pairs[4], pairs[5], pairs[6], pairs[7], BF16)
        split = tl.reshape(tl.join(even, odd), (BN, 4, 2, 2, 2, 2, 2))  # n, t, v, b, j16, j32, j
        columns = (
            tl.permute(split, (0, 2, 5, 4, 1, 6, 3))
            if QUADS
            else tl.permute(split, (0, 2, 5, 4, 6, 1, 3))
        )
    return tl.reshape(columns, (BN, TILE_K))


@triton.jit
def join_four(p0, p1, p2, p3, BF16: tl.constexpr):
    """Pairs [...] to 16-bit floats [..., b, low bit of the pair's number, high bit]."""
    low = tl.join(halves(p0, BF16), halves(p1, BF16))
    high = tl.join(halves(p2, BF16), halves(p3, BF16))
    return tl.join(low, high)
