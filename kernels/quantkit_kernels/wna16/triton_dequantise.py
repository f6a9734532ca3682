# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton: a tile of packed weights to floats, their scales and zero-points applied."""

import triton
import triton.language as tl

from quantkit_kernels.wna16.triton_codes import look_up, unpack_float8
from quantkit_kernels.wna16.triton_pairs import fma_pair, make_pair, mul_pair
from quantkit_kernels.wna16.triton_unpack import (
    TILE_N,
    arrange,
    factor_of,
    is_value,
    negative_zero_pair,
    spread,
    unpack,
)

WHOLE_ROW = tl.constexpr(0)
"""The group size G of rows with one scale each."""


@triton.constexpr_function
def groups_per_tile(group: int) -> int:
    """Scales of one row that one step along k needs."""
    return 128 // group if group else 1


@triton.constexpr_function
def groups_per_word(bits: int, group: int) -> int:
    """Scales that the codes of one word have: a word spans 16 columns at 8 bits, 64 at 2."""
    in_a_tile: int = groups_per_tile(group)
    return max(1, in_a_tile // bits)


@triton.constexpr_function
def group_of(pair: int, bits: int, group: int) -> int:
    """Which of the scales of its word a pair has. Pairs 8 columns apart are the upper half."""
    spans = 8 // bits if bits < 8 else 1
    groups: int = groups_per_word(bits, group)
    return pair % spans * groups // spans


@triton.jit
def load_groups(scales_ptr, k_tile, rows, padded_n, BITS: tl.constexpr, G: tl.constexpr):
    """Scale words of one k tile: int32 [BN, COUNT], one tensor for each group of a word."""
    PER_TILE: tl.constexpr = groups_per_tile(G)
    STEP: tl.constexpr = groups_per_word(BITS, G)
    first = k_tile * PER_TILE + tl.arange(0, PER_TILE // STEP) * STEP
    pointers = scales_ptr + first[None, :] * padded_n + rows[:, None]
    words = tl.load(pointers)
    if STEP == 1:
        return (words,)
    elif STEP == 2:
        return words, tl.load(pointers + padded_n)
    else:
        return (
            words,
            tl.load(pointers + padded_n),
            tl.load(pointers + 2 * padded_n),
            tl.load(pointers + 3 * padded_n),
        )


@triton.jit
def value_pair(
    pair,
    groups,
    PAIR: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    BN: tl.constexpr,
    G: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
):
    """The value of pair number PAIR of `unpack`, exactly; times FACTOR * scale, rounded, if SCALE.

    A zero-point in the low byte of a scale is too small to matter to the rounding, except of ties.
    """
    COUNT: tl.constexpr = groups_per_tile(G) // groups_per_word(BITS, G)
    group = groups[group_of(PAIR, BITS, G)]
    if CODE == "int":
        TIMES: tl.constexpr = factor_of(PAIR, BITS, BF16)
        if not is_value(BITS, BF16, ZERO):
            zero = negative_zero_pair(group, TIMES, BITS, BF16, ZERO, ASM)
            pair = fma_pair(pair, 1.0 / TIMES, spread(zero, BN, BITS, COUNT), BF16, ASM)
    if SCALE:
        scale = make_pair(group.to(tl.float32, bitcast=True) * FACTOR, BF16, ASM)
        return mul_pair(pair, spread(scale, BN, BITS, COUNT), BF16, ASM)
    else:
        return pair


@triton.jit
def dequantise_tile(
    words,
    groups,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    BN: tl.constexpr,
    G: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    REST: tl.constexpr,
    QUADS: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
):
    """value [* scale] as 16-bit floats [BN, 128] from words [BN, 4 * BITS].

    REST: what code books lose to the 16 bits instead.
    """
    # E4M3 scales are small: 256 keeps them normal in float16, and saves that product.
    FOLD: tl.constexpr = SCALE and CODE == "e4m3" and not BF16
    FACTOR: tl.constexpr = 256.0 if FOLD else 1.0
    if CODE == "int":
        pairs = unpack(words, BITS, BF16, ASM)
    elif BITS == 8:
        pairs = unpack_float8(words, CODE, BF16, not FOLD, ASM)
    else:
        pairs = look_up(words, CODE, BF16, REST, ASM)
    values = ()
    for i in tl.static_range(16 // BITS):
        value = value_pair(pairs[i], groups, i, BITS, CODE, BN, G, ZERO, SCALE, FACTOR, BF16, ASM)
        # Triton has no starred expressions, mypy no tuple that grows.
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
    return arrange(values, BN, BITS, QUADS, BF16)


@triton.jit
def code_pointers(codes_ptr, first_row, k_tiles, BN: tl.constexpr, BITS: tl.constexpr):
    """Pointers [BN, 4 * BITS] to the words of `rows` in k tile 0."""
    WORDS: tl.constexpr = 4 * BITS
    tile = first_row // TILE_N * k_tiles * (TILE_N * WORDS) + first_row % TILE_N * WORDS
    return codes_ptr + tile + (tl.arange(0, BN) * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]


@triton.jit
def exact_values(
    words,
    groups,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    ROWS: tl.constexpr,
    G: tl.constexpr,
    ZERO: tl.constexpr,
    QUADS: tl.constexpr,
    ASM: tl.constexpr,
):
    """float32 values [ROWS, 128]: those of code books as a 16-bit float and what that lacks."""
    values = dequantise_tile(
        words, groups, BITS, CODE, ROWS, G, ZERO, False, False, QUADS, False, ASM
    )
    exact = values.to(tl.float32)
    if BITS == 4 and CODE != "int":
        rest = dequantise_tile(
            words, groups, BITS, CODE, ROWS, G, ZERO, False, True, QUADS, False, ASM
        )
        exact += rest.to(tl.float32)
    return exact
