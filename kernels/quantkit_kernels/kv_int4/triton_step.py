# ruff: noqa: ANN001, ANN201, RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
"""Triton: what a step of decoding computes of one tile of positions.

Two neighbouring bytes are unpacked together: the even and the odd dimensions of a key, the values
of an even and of the odd position that follows. Each of the two is a tile of its own, so that no
number has to change place before the tensor cores take it.
"""

import triton
import triton.language as tl

from quantkit_kernels.kv_int4.triton_codes import (
    pair_nibbles,
    rounded,
    scales_of,
    zero_rows,
    zeros_of,
)


@triton.jit
def load_queries(pointers, inside, C: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """Query rows, addresses [R], in COUNT times C dimensions, as `key_product` takes them.

    Of each C dimensions the even ones [C / 2, R], then the odd ones; one tile [C, R] where half
    of them would be less than the 16 that tensor cores sum at a time.
    """
    SIDES: tl.constexpr = 1 if C < 32 else 2
    k = tl.arange(0, C // SIDES)
    order = 2 * (k % (C // 2)) + k // (C // 2)
    pieces = ()
    for i in tl.static_range(COUNT * SIDES):
        dims = i // SIDES * C + i % SIDES + order
        q = tl.load(pointers[None, :] + dims[:, None], mask=inside[None, :], other=0.0)
        if WIDE:
            q = q.to(tl.float32)
        pieces = pieces + (q,)
    return pieces


@triton.jit
def sums_of(pieces, GROUPS: tl.constexpr):
    """float32 sums [R] over each of GROUPS equal parts of the pieces [C, R]."""
    EACH: tl.constexpr = len(pieces) // GROUPS
    sums = ()
    for g in tl.static_range(GROUPS):
        total = tl.sum(pieces[g * EACH].to(tl.float32), axis=0)
        for i in tl.static_range(1, EACH):
            total += tl.sum(pieces[g * EACH + i].to(tl.float32), axis=0)
        sums = sums + (total,)
    return sums


@triton.jit
def load_pieces(pointers, step, COUNT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Codes at pointers, pointers + step ... as floats: COUNT times the tiles of `pair_nibbles`."""
    pieces = ()
    for i in tl.static_range(COUNT):
        pieces = pieces + (pair_nibbles(tl.load(pointers + i * step), DTYPE, ASM),)
    return pieces


@triton.jit
def key_product(pieces, queries, total, i: tl.constexpr):
    """Total, or 0 where it is None, + keys times queries of piece i: low nibbles first, then high.

    Args:
        pieces: as `load_pieces`, [M, C / 2] each.
        queries: as `load_queries`.
    """
    COUNT: tl.constexpr = len(pieces)
    codes = pieces[i % COUNT]
    even = codes[i // COUNT]
    odd = codes[2 + i // COUNT]
    if len(queries) == 2 * COUNT:
        both = tl.permute(tl.join(even, odd), (0, 2, 1))
        both = tl.reshape(both, (even.shape[0], 2 * even.shape[1]))
        return tl.dot(both, queries[i], total, input_precision="ieee")
    else:
        total = tl.dot(even, queries[2 * i], total, input_precision="ieee")
        return tl.dot(odd, queries[2 * i + 1], total, input_precision="ieee")


@triton.jit
def products(
    sides,
    queries,
    sums,
    words,
    BS: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """k' q' [N / 2, R] = sum_g scale_g ((base + code) . q_g - (base + zero_g) sum(q_g)), twice.

    Args:
        sides: pieces of the keys of even positions, and of odd ones.
        queries, sums: as `load_queries` and `sums_of`.
        words: addresses [N / 2] of the first group's, two positions each.
    """
    EACH: tl.constexpr = 2 * len(sides[0]) // GROUPS
    totals = ()
    for g in tl.static_range(GROUPS):
        word = tl.load(words + g * (BS // 2))
        zeros = zeros_of(word, DTYPE, ASM)
        scales = scales_of(word, ASM)
        new = ()
        for side in tl.static_range(2):
            dot = key_product(sides[side], queries, None, g * EACH)
            for i in tl.static_range(g * EACH + 1, (g + 1) * EACH):
                dot = key_product(sides[side], queries, dot, i)
            part = (dot - zeros[side][:, None] * sums[g][None, :]) * scales[side][:, None]
            new = new + (part if g == 0 else totals[side] + part,)
        totals = new
    return totals


@triton.jit
def weight(p, scale, inside, seen, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """P scale, rounded to DTYPE; 0 where a position is not inside, or not seen."""
    scaled = p * tl.where(inside, scale, 0.0)[:, None]
    if seen is not None:  # A later token may be NaN: it is none of an earlier query's.
        scaled = tl.where(seen, scaled, 0.0)
    return rounded(scaled, DTYPE, ASM)


@triton.jit
def weigh(
    p,
    words,
    inside,
    seen,
    BS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """P scale_g, rounded, of both sides, and sum_n of that times base + zero_g, for each group.

    Words of positions that are not `inside` may hold anything, and count as 0.

    Args:
        p: probabilities [N / 2, R] of even positions, and of odd ones.
        words: addresses [N / 2] of the first group's of values, two positions each.
        inside: positions that some row sees, [N / 2] twice.
        seen: those that each row does, [N / 2, R] twice, or None where all rows see the same.
        ROWS: of a piece of values.

    Returns:
        Weights, GROUPS times two, and corrections, GROUPS tiles of equal rows [ROWS, R], or
        [1, R] in float32.
    """
    WIDE: tl.constexpr = DTYPE == tl.float32  # noqa: SIM300
    weights = ()
    corrections = ()
    for g in tl.static_range(GROUPS):
        word = tl.load(words + g * (BS // 2))
        scale, odd_scale = scales_of(word, ASM)
        even = weight(p[0], scale, inside[0], None if seen is None else seen[0], DTYPE, ASM)
        odd = weight(p[1], odd_scale, inside[1], None if seen is None else seen[1], DTYPE, ASM)
        # Of the rounded weights: those of the others would not cancel the base.
        if WIDE:
            zero, odd_zero = zeros_of(word, DTYPE, ASM)
            terms = even * zero[:, None] + odd * odd_zero[:, None]
            correction = tl.sum(terms, axis=0)[None, :]
        else:
            # In the tensor cores, which leave every row's sum where it is needed.
            zero, odd_zero = zero_rows(word, ROWS, ASM)
            correction = tl.dot(zero, even, input_precision="ieee")
            correction = tl.dot(odd_zero, odd, correction, input_precision="ieee")
        weights = weights + ((even, odd),)
        corrections = corrections + (correction,)
    return weights, corrections


@triton.jit
def accumulate(sums, pieces, weights, corrections, decay):
    """O^T = decay O^T + V^T P^T - corrections, in tiles [C, R] of the low nibbles, then the high.

    Args:
        pieces: as `load_pieces`, [C, N / 2] each.
        weights, corrections: as `weigh`.
    """
    COUNT: tl.constexpr = len(pieces)
    EACH: tl.constexpr = 2 * COUNT // len(weights)
    new = ()
    for i in tl.static_range(2 * COUNT):
        codes = pieces[i % COUNT]
        even, odd = weights[i // EACH]
        total = sums[i] * decay[None, :] - corrections[i // EACH]
        total = tl.dot(codes[i // COUNT], even, total, input_precision="ieee")
        total = tl.dot(codes[2 + i // COUNT], odd, total, input_precision="ieee")
        new = new + (total,)
    return new
