# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton: rotated keys and values to codes and words, as `reference.quantise` defines them."""

import triton
import triton.language as tl

from quantkit_kernels.act_quant.triton_kernels import clamp, rint

SMALLEST_SCALE = tl.constexpr(2.0**-14)
LARGEST_SCALE = tl.constexpr(65024.0)
NAN_WORD = tl.constexpr(0x7E00)
SCALES = tl.constexpr(8)
"""Those that are tried for a group."""

DROPPED = tl.constexpr((1 << 17) - 1)
"""The bits of float32's mantissa that a scale does without."""

ONE_LESS = tl.constexpr(1 << 17)
"""What the bits of a scale exceed those of the next smaller one by."""


@triton.jit
def in_order(low, high, HALF: tl.constexpr):
    """[M, 2 HP] of two tiles [M, HP]: dimension d in column d, anything behind the last."""
    HP: tl.constexpr = low.shape[1]
    SHAPE: tl.constexpr = (low.shape[0], 2 * HP)
    both = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), SHAPE)
    if HALF < HP:
        d = tl.arange(0, 2 * HP)
        source = tl.where(d < HALF, d, tl.minimum(d + (HP - HALF), 2 * HP - 1))
        both = tl.gather(both, tl.broadcast_to(source[None, :], SHAPE), 1)
    return both


@triton.jit
def packed(codes, HALF: tl.constexpr):
    """Bytes [M, HP] of codes int32 [M, 2 HP] that are in order."""
    HP: tl.constexpr = codes.shape[1] // 2
    if HALF < HP:
        c = tl.arange(0, 2 * HP)
        source = tl.where(c < HP, c, c - (HP - HALF))
        codes = tl.gather(codes, tl.broadcast_to(source[None, :], codes.shape), 1)
    halves = tl.reshape(codes, (codes.shape[0], 2, HP))
    low, high = tl.split(tl.permute(halves, (0, 2, 1)))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def divided(values, scale, inverse):
    """Values / scale, as rounded by a division, inverse being 1 / scale to a few ulps.

    The remainder is exact, so the last sum is off by less than 2**-19 ulp before it is rounded.
    A scale has 7 significant bits: a quotient lies at least 1/254 ulp from where rounding turns.
    """
    near = values * inverse
    return tl.fma(tl.fma(-near, scale, values), inverse, near)


@triton.jit
def grid(groups, negative_low, scale):
    """Codes less their zero-points, [M, G, GROUP], and zero-points [M, G], at scales [M, G]."""
    inverse = 1.0 / scale
    zero = clamp(rint(divided(negative_low, scale, inverse)), 0.0, 15.0)
    wide = zero[:, :, None]
    steps = rint(divided(groups, scale[:, :, None], inverse[:, :, None]))
    return clamp(steps, -wide, 15.0 - wide), zero


@triton.jit
def search(groups):
    """Of a group's scales the first with the least squared error, [M, G], with -min(y, 0).

    The scale is infinite where there is none: no error of what is not finite is.
    """
    negative_low = tl.maximum(-tl.min(groups, axis=2), 0.0)
    spread = negative_low + tl.maximum(tl.max(groups, axis=2), 0.0)
    bits = tl.maximum(tl.div_rn(spread, 15.0), SMALLEST_SCALE).to(tl.int32, bitcast=True)
    bits = (bits + DROPPED) & ~DROPPED
    held = bits.to(tl.float32, bitcast=True) <= LARGEST_SCALE
    best = tl.full(bits.shape, float("inf"), tl.float32)
    least = best
    for _ in tl.range(SCALES, num_stages=1):
        scale = tl.maximum(bits.to(tl.float32, bitcast=True), SMALLEST_SCALE)
        steps = grid(groups, negative_low, scale)[0]
        difference = steps * scale[:, :, None] - groups
        error = tl.sum(difference * difference, axis=2)
        best = tl.where(error < least, scale, best)
        least = tl.minimum(error, least)
        bits -= ONE_LESS
    return tl.where(held, best, float("inf")), negative_low


@triton.jit
def quantise(low, high, words, real, HALF: tl.constexpr, GROUP: tl.constexpr, BS: tl.constexpr):
    """Bytes [M, HP] of two tiles [M, HP]; the words are stored.

    words: addresses [M] of int16, a group's BS behind those of the group before.
    """
    M: tl.constexpr = low.shape[0]
    COUNT: tl.constexpr = 2 * low.shape[1] // GROUP
    groups = tl.reshape(in_order(low, high, HALF), (M, COUNT, GROUP))
    scale, negative_low = search(groups)
    good = scale <= LARGEST_SCALE
    scale = tl.where(good, scale, 1.0)
    steps, zero = grid(groups, negative_low, scale)
    word = scale.to(tl.float16).to(tl.int16, bitcast=True) | zero.to(tl.int16)
    g = tl.arange(0, COUNT)[None, :]
    stored = real[:, None] & (g < 2 * HALF // GROUP)
    tl.store(words[:, None] + g * BS, tl.where(good, word, NAN_WORD).to(tl.int16), mask=stored)
    codes = tl.where(good[:, :, None], steps + zero[:, :, None], 0.0).to(tl.int32)
    return packed(tl.reshape(codes, (M, COUNT * GROUP)), HALF)
