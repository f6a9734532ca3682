# ruff: noqa: ANN001, ANN201, RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
"""Triton kernels: a few queries a request against keys and values of 4 bits.

Operands are swapped, S^T = K q^T and O^T = V^T P^T: keys and values, dequantised in registers, are
the left operands of the tensor cores, and the few query rows their short side. Codes enter as
base + code; scales and zero-points are applied to float32 sums, so no key or value is rounded.
"""

import triton
import triton.language as tl

from quantkit_kernels.kv_int4.triton_codes import MASKED
from quantkit_kernels.kv_int4.triton_step import (
    accumulate,
    load_pieces,
    load_queries,
    products,
    sums_of,
    weigh,
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
def visible(at, length, queries, position, WINDOW: tl.constexpr, MANY: tl.constexpr):
    """Positions [M] that some row sees, and those [M, R or 1] that each row does."""
    inside = at < length
    seen = at[:, None] <= position[None, :] if MANY else inside[:, None]
    if WINDOW > 0:
        seen = seen & (at[:, None] > position[None, :] - WINDOW)
        inside = inside & (at > length - queries - WINDOW)
    return inside, seen


@triton.jit(do_not_specialize=["tokens", "splits", "softcap", "table_stride"])
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
    q_sums = sums_of(q, KEY_GROUPS)
    shift = tl.zeros((R,), tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + row, mask=real, other=0.0)
    best = tl.full((R,), MASKED, tl.float32)
    total = tl.zeros((R,), tl.float32)
    sums = ()
    for _ in tl.static_range(2 * VALUE_COUNT):
        sums = sums + (tl.zeros((VALUE_PIECE, R), tl.float32),)
    pairs = tl.arange(0, N // 2)
    key_offsets = pairs[:, None] * HALF + tl.arange(0, KEY_PIECE // 2)[None, :]
    value_offsets = tl.arange(0, VALUE_PIECE)[:, None] * (BS // 2) + pairs[None, :]
    table = table_ptr + request * table_stride
    cache = cache_ptr + head * head_stride
    for t in tl.range(first, last, N, num_stages=STAGES):
        # Triton 3.6 does not see it, and would not load what is aligned by it asynchronously.
        offset = tl.multiple_of(t % BS, N)
        block = cache + tl.load(table + t // BS).to(tl.int64) * block_stride
        keys = (block + offset * HALF).to(tl.pointer_type(tl.uint16)) + key_offsets
        values = (block + BS * HALF + offset).to(tl.pointer_type(tl.uint16)) + value_offsets
        words = (block + BS * P + 2 * offset).to(tl.pointer_type(tl.uint32)) + pairs
        even = load_pieces(keys, KEY_PIECE // 2, KEY_COUNT, KEY, ASM)
        odd = load_pieces(keys + HALF // 2, KEY_PIECE // 2, KEY_COUNT, KEY, ASM)
        even, odd = products((even, odd), q, q_sums, words, BS, KEY_GROUPS, KEY, ASM)
        if shift_ptr is not None:
            even += shift[None, :]
            odd += shift[None, :]
        even = softcapped(even, softcap, CAPPED)
        odd = softcapped(odd, softcap, CAPPED)
        at = t + 2 * pairs
        inside, seen = visible(at, length, queries, position, WINDOW, MANY)
        inside_odd, seen_odd = visible(at + 1, length, queries, position, WINDOW, MANY)
        even = tl.where(seen, even, MASKED)
        odd = tl.where(seen_odd, odd, MASKED)
        top = tl.maximum(best, tl.max(tl.maximum(even, odd), axis=0))
        decay = tl.exp2(best - top)
        even = tl.exp2(even - top[None, :])
        odd = tl.exp2(odd - top[None, :])
        total = total * decay + tl.sum(even + odd, axis=0)
        best = top
        weights, corrections = weigh(
            (even, odd),
            words + KEY_GROUPS * (BS // 2),
            (inside, inside_odd),
            (seen, seen_odd) if MANY else None,
            BS,
            P // VALUE_GROUP,
            VALUE_PIECE,
            VALUE,
            ASM,
        )
        codes = load_pieces(values, VALUE_PIECE * (BS // 2), VALUE_COUNT, VALUE, ASM)
        sums = accumulate(sums, codes, weights, corrections, decay)
    row += split * tokens * q_heads
    out = out_ptr + row.to(tl.int64)[None, :] * P + tl.arange(0, VALUE_PIECE)[:, None]
    for i in tl.static_range(2 * VALUE_COUNT):
        tl.store(out + i * VALUE_PIECE, sums[i] / total[None, :], mask=real[None, :])
    tl.store(lse_ptr + row, best + tl.log2(total), mask=real)
