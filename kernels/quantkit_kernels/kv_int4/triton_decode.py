# ruff: noqa: ANN001, ANN201, RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
"""Triton kernels: a few queries a request against keys and values of 4 bits.

Operands are swapped, S^T = K q^T and O^T = V^T P^T: keys and values, dequantised in registers, are
the left operands of the tensor cores, and the few query rows their short side. Codes enter as
base + code; scales and zero-points are applied to float32 sums, so no key or value is rounded.
"""

import triton
import triton.language as tl

from quantkit_kernels.kv_int4.triton_codes import (
    MASKED,
    nibbles,
    piece,
    rounded,
    scale_of,
    zero_of,
)


@triton.jit
def span_of(length, queries, splits, WINDOW: tl.constexpr, N: tl.constexpr):
    """First position that any query sees, in whole tiles, and the positions of a split."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - queries - WINDOW + 1, 0) // N * N
    return first, tl.cdiv(tl.cdiv(length - first, splits), N) * N


@triton.jit
def softcapped(logits, softcap, CAPPED: tl.constexpr):
    """log2(e) * c * tanh(x) where CAPPED, c log2(e) being `softcap`; else x."""
    if CAPPED:
        return softcap * (1.0 - 2.0 / (tl.exp2(logits * 2.8853900817779268) + 1.0))
    else:
        return logits


@triton.jit
def load_queries(pointers, inside, C: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """COUNT pieces [C, R] of query rows, which are addresses [R]."""
    dims = tl.arange(0, C)
    pieces = ()
    for i in tl.static_range(COUNT):
        q = tl.load(pointers[None, :] + (i * C + dims)[:, None], mask=inside[None, :], other=0.0)
        if WIDE:
            q = q.to(tl.float32)
        pieces = pieces + (q,)
    return pieces


@triton.jit
def sums_of(pieces, GROUPS: tl.constexpr, EACH: tl.constexpr):
    """float32 sums [R] over each group of EACH pieces [C, R]."""
    sums = ()
    for g in tl.static_range(GROUPS):
        total = tl.sum(pieces[g * EACH].to(tl.float32), axis=0)
        for i in tl.static_range(1, EACH):
            total += tl.sum(pieces[g * EACH + i].to(tl.float32), axis=0)
        sums = sums + (total,)
    return sums


@triton.jit
def load_pieces(pointers, step, COUNT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Codes at pointers, pointers + step ... as floats: COUNT tiles of low nibbles, of high."""
    low = ()
    high = ()
    for i in tl.static_range(COUNT):
        a, b = nibbles(tl.load(pointers + i * step), DTYPE, ASM)
        low = low + (a,)
        high = high + (b,)
    return low, high


@triton.jit
def products(
    low,
    high,
    queries,
    sums,
    words,
    BS: tl.constexpr,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    COUNT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """k' q' [N, R] = sum_g scale_g ((base + code) . q_g - (base + zero_g) sum(q_g))."""
    total = None
    for g in tl.static_range(GROUPS):
        dot = tl.dot(piece(low, high, g * EACH, COUNT), queries[g * EACH], input_precision="ieee")
        for i in tl.static_range(1, EACH):
            codes = piece(low, high, g * EACH + i, COUNT)
            dot = tl.dot(codes, queries[g * EACH + i], dot, input_precision="ieee")
        word = tl.load(words + g * BS)
        part = (dot - zero_of(word, DTYPE)[:, None] * sums[g][None, :]) * scale_of(word)[:, None]
        total = part if g == 0 else total + part
    return total


@triton.jit
def weigh(
    p,
    words,
    inside,
    seen,
    BS: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """P scale_g [N, R], rounded, and sum_n of that times base + zero_g, for each group of values.

    Words of positions that are not `inside` may hold anything, and count as 0.
    """
    weights = ()
    corrections = ()
    for g in tl.static_range(GROUPS):
        word = tl.where(inside, tl.load(words + g * BS), 0)
        scaled = p * scale_of(word)[:, None]
        if seen is not None:  # A later token may be NaN: it is none of an earlier query's.
            scaled = tl.where(seen, scaled, 0.0)
        weight, exact = rounded(scaled, DTYPE, ASM)
        # Of the rounded weights: those of the others would not cancel the base.
        correction = tl.sum(exact * zero_of(word, DTYPE)[:, None], axis=0)
        weights = weights + (weight,)
        corrections = corrections + (correction,)
    return weights, corrections


@triton.jit
def accumulate(
    sums,
    low,
    high,
    weights,
    corrections,
    decay,
    EACH: tl.constexpr,
    COUNT: tl.constexpr,
):
    """O^T = decay O^T + V^T P^T, in 2 * COUNT pieces [C, R]."""
    new = ()
    for i in tl.static_range(2 * COUNT):
        start = sums[i] * decay[None, :] - corrections[i // EACH][None, :]
        codes = piece(low, high, i, COUNT)
        dot = tl.dot(codes, weights[i // EACH], start, input_precision="ieee")
        new = new + (dot,)
    return new


@triton.jit(do_not_specialize=["tokens", "splits", "softcap"])
def attend_split(  # noqa: PLR0915
    q_ptr,
    shift_ptr,
    cache_ptr,
    table_ptr,
    lengths_ptr,
    starts_ptr,
    out_ptr,
    lse_ptr,
    tokens,
    q_heads,
    table_stride,
    block_stride,
    head_stride,
    splits,
    softcap,
    G: tl.constexpr,
    HALF: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    KEY_PIECE: tl.constexpr,
    VALUE_PIECE: tl.constexpr,
    BS: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    MANY: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """o'[s] = softmax over the positions of split s of (k' q'^T) times v', and its log2-sum-exp2.

    Programs are (request, KV head and tile of R query rows, split). Rows are the G heads of query
    0, those of query 1 ...

    Args:
        q_ptr: [tokens, q_heads, 2 HALF], rotated, times what makes products logits to base 2, or
            logits over the softcap.
        shift_ptr: float32 [tokens, q_heads], q.mu in the same unit, or None where it drops out.
        cache_ptr: uint8, in `CacheLayout` with columns of values.
        table_ptr: int32 [requests, table_stride].
        lengths_ptr, starts_ptr: int32 [requests], [requests + 1].
        out_ptr: float32 [splits, tokens, q_heads, 2 HALF].
        lse_ptr: float32 [splits, tokens, q_heads].
        softcap: c log2(e).
        KEY_PIECE, VALUE_PIECE: dimensions whose codes one tile holds; a divisor of HALF and group.
        N: positions in a tile, a divisor of BS.
        MANY: requests may have several queries.
    """
    P: tl.constexpr = 2 * HALF
    WIDE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    KEY: tl.constexpr = q_ptr.dtype.element_ty
    # P times a scale spans more than float16 does.
    VALUE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    KEY_COUNT: tl.constexpr = HALF // KEY_PIECE
    VALUE_COUNT: tl.constexpr = HALF // VALUE_PIECE
    KEY_GROUPS: tl.constexpr = P // KEY_GROUP
    request = tl.program_id(0)
    heads = q_heads // G
    head = tl.program_id(1) % heads
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + request)
    start = tl.load(starts_ptr + request)
    queries = tl.load(starts_ptr + request + 1) - start
    rows = tl.program_id(1) // heads * R + tl.arange(0, R)
    first, share = span_of(length, queries, splits, WINDOW, N)
    first += split * share
    last = tl.minimum(first + share, length)
    if (first >= last) | (tl.program_id(1) // heads * R >= queries * G):
        return
    real = rows < queries * G
    row = (start + rows // G) * q_heads + head * G + rows % G
    position = length - queries + rows // G
    q = load_queries(q_ptr + row * P, real, KEY_PIECE, 2 * KEY_COUNT, WIDE or not ASM)
    q_sums = sums_of(q, KEY_GROUPS, KEY_GROUP // KEY_PIECE)
    shift = tl.zeros((R,), tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + row, mask=real, other=0.0)
    best = tl.full((R,), MASKED, tl.float32)
    total = tl.zeros((R,), tl.float32)
    sums = ()
    for _ in tl.static_range(2 * VALUE_COUNT):
        sums = sums + (tl.zeros((VALUE_PIECE, R), tl.float32),)
    n = tl.arange(0, N)
    key_offsets = n[:, None] * HALF + tl.arange(0, KEY_PIECE)[None, :]
    value_offsets = BS * HALF + tl.arange(0, VALUE_PIECE)[:, None] * BS + n[None, :]
    table = table_ptr + request * table_stride
    cache = cache_ptr + head * head_stride
    for t in tl.range(first, last, N, num_stages=STAGES):
        block = cache + tl.load(table + t // BS).to(tl.int64) * block_stride
        words = (block + BS * P).to(tl.pointer_type(tl.uint16)) + t % BS + n
        low, high = load_pieces(block + t % BS * HALF + key_offsets, KEY_PIECE, KEY_COUNT, KEY, ASM)
        logits = products(
            low, high, q, q_sums, words, BS, KEY_GROUPS, KEY_GROUP // KEY_PIECE, KEY_COUNT, KEY
        )
        if shift_ptr is not None:
            logits += shift[None, :]
        logits = softcapped(logits, softcap, CAPPED)
        at = t + n
        inside = at < length
        seen = at[:, None] <= position[None, :] if MANY else inside[:, None]
        if WINDOW > 0:
            seen = seen & (at[:, None] > position[None, :] - WINDOW)
            inside = inside & (at > length - queries - WINDOW)
        logits = tl.where(seen, logits, MASKED)
        top = tl.maximum(best, tl.max(logits, axis=0))
        decay = tl.exp2(best - top)
        p = tl.exp2(logits - top[None, :])
        total = total * decay + tl.sum(p, axis=0)
        best = top
        weights, corrections = weigh(
            p,
            words + KEY_GROUPS * BS,
            inside,
            seen if MANY else None,
            BS,
            P // VALUE_GROUP,
            VALUE,
            ASM,
        )
        low, high = load_pieces(
            block + t % BS + value_offsets, VALUE_PIECE * BS, VALUE_COUNT, VALUE, ASM
        )
        sums = accumulate(
            sums, low, high, weights, corrections, decay, VALUE_GROUP // VALUE_PIECE, VALUE_COUNT
        )
    row += split * tokens * q_heads
    out = out_ptr + row.to(tl.int64)[None, :] * P + tl.arange(0, VALUE_PIECE)[:, None]
    for i in tl.static_range(2 * VALUE_COUNT):
        tl.store(out + i * VALUE_PIECE, sums[i] / total[None, :], mask=real[None, :])
    tl.store(lse_ptr + row, best + tl.log2(total), mask=real)
