# ruff: noqa: ANN001, ANN201, SIM300
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel: many queries a request, against the cache and against this step's tokens.

What is in the cache is attended to first, rotated; then the sums are rotated back, once, and this
step's keys and values follow as they are. A request without a past thus never sees a rotation.
"""

import triton
import triton.language as tl

from quantkit_kernels.kv_int4.triton_codes import MASKED, nibbles, scale_of, zero_of
from quantkit_kernels.kv_int4.triton_decode import softcapped
from quantkit_kernels.kv_int4.triton_merge import sink_weights
from quantkit_kernels.kv_int4.triton_rotate import load_head, load_row, store_head, turn


@triton.jit
def spread_words(
    words,
    inside,
    FIRST: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BS: tl.constexpr,
    N: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Zero-points + base and scales, float32 [HP, N], of dimensions from FIRST on.

    Args:
        words: addresses [N] of the first group's.
        inside: positions [N] whose words mean something; the others' scale is 0.
    """
    HP: tl.constexpr = triton.next_power_of_2(HALF)
    if HP == HALF:
        # Groups fill a half, or a half lies in one group: a word is loaded once, and repeated.
        COUNT: tl.constexpr = max(HALF // GROUP, 1)
        rows = FIRST // GROUP + tl.arange(0, COUNT)
        pointers = words[None, :] + rows[:, None] * BS
        word = tl.load(pointers, mask=inside[None, :], other=0)
        zero = tl.broadcast_to(zero_of(word, DTYPE)[:, None, :], (COUNT, HP // COUNT, N))
        scale = tl.broadcast_to(scale_of(word)[:, None, :], (COUNT, HP // COUNT, N))
        return tl.reshape(zero, (HP, N)), tl.reshape(scale, (HP, N))
    else:
        i = tl.arange(0, HP)
        pointers = words[None, :] + ((FIRST + i) // GROUP * BS)[:, None]
        word = tl.load(pointers, mask=inside[None, :] & (i < HALF)[:, None], other=0)
        return zero_of(word, DTYPE), scale_of(word)


@triton.jit
def load_tile(
    pointers,
    words,
    inside,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BS: tl.constexpr,
    N: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """(code - zero) scale, rounded to DTYPE: the tiles [HP, N] of low and of high nibbles.

    Words of positions that are not `inside` may hold anything, and their values are 0.
    """
    i = tl.arange(0, triton.next_power_of_2(HALF))
    if triton.next_power_of_2(HALF) == HALF:
        codes = tl.load(pointers)
    else:
        codes = tl.load(pointers, mask=(i < HALF)[:, None], other=0)
    low, high = nibbles(codes, DTYPE, ASM)
    zero, scale = spread_words(words, inside, 0, HALF, GROUP, BS, N, DTYPE)
    low = (low - zero.to(low.dtype)) * scale.to(low.dtype)
    zero, scale = spread_words(words, inside, HALF, HALF, GROUP, BS, N, DTYPE)
    high = (high - zero.to(high.dtype)) * scale.to(high.dtype)
    return low, high


@triton.jit
def soften(logits, seen, best, total):
    """Exponentials [M, N] of logits, what earlier sums are multiplied by, new best and total."""
    logits = tl.where(seen, logits, MASKED)
    top = tl.maximum(best, tl.max(logits, axis=1))
    decay = tl.exp2(best - top)
    p = tl.exp2(logits - top[:, None])
    return p, decay, top, total * decay + tl.sum(p, axis=1)


@triton.jit(do_not_specialize=["softcap", "factor", "table_stride"])
def prefill_rows(  # noqa: C901, PLR0915
    query_ptr,
    key_ptr,
    value_ptr,
    shift_ptr,
    scale_ptr,
    sinks_ptr,
    signs_ptr,
    cache_ptr,
    table_ptr,
    lengths_ptr,
    starts_ptr,
    out_ptr,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    block_stride,
    head_stride,
    factor,
    softcap,
    root,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    BS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    RAW: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """out = softmax(logits) values over the cache's positions, and, if RAW, this step's tokens.

    Programs are (tile of M rows, KV head, request). Rows are the G heads of query 0, those of
    query 1 ... A product times factor is a logit to base 2, or a logit over the softcap.

    Args:
        query_ptr, out_ptr: [tokens, heads * G, D].
        key_ptr, value_ptr: [tokens, heads, D]; read if RAW.
        shift_ptr, scale_ptr: float32 [heads, D], or None.
        sinks_ptr: float32 [heads * G], or None.
        signs_ptr: bfloat16 [D, 2 HALF].
        cache_ptr: uint8, in `CacheLayout` with columns of values.
        table_ptr: int32 [requests, table_stride].
        lengths_ptr, starts_ptr: int32 [requests], [requests + 1].
        softcap: c log2(e).
        N: positions in a tile, a divisor of BS.
    """
    P: tl.constexpr = 2 * HALF
    HP: tl.constexpr = triton.next_power_of_2(HALF)
    TYPE: tl.constexpr = query_ptr.dtype.element_ty
    MATH: tl.constexpr = TYPE if ASM else tl.float32
    EXACT: tl.constexpr = TYPE == tl.float32
    head = tl.program_id(1)
    request = tl.program_id(2)
    length = tl.load(lengths_ptr + request)
    start = tl.load(starts_ptr + request)
    queries = tl.load(starts_ptr + request + 1) - start
    # The last rows see most: they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if (tile * M >= queries * G) | (length <= 0):
        return
    rows = tile * M + tl.arange(0, M)
    query = rows // G
    real = query < queries
    q_head = head * G + rows % G
    past = length - queries
    position = past + query
    lowest = tl.maximum(past + tile * M // G - WINDOW + 1, 0) if WINDOW > 0 else 0
    highest = past + tl.minimum((tile * M + M - 1) // G + 1, queries)
    n = tl.arange(0, N)
    i = tl.arange(0, HP)
    wide = (start + query).to(tl.int64)
    query_rows = query_ptr + wide * query_stride + q_head * query_head_stride
    best = tl.full((M,), MASKED, tl.float32)
    total = tl.zeros((M,), tl.float32)
    first = tl.zeros((M, HP), tl.float32)
    second = tl.zeros((M, HP), tl.float32)
    stop = past if RAW else highest
    if lowest < stop:
        q_first, q_second = load_head(query_rows, real, D, HALF)
        shift = tl.zeros((M,), tl.float32)
        if shift_ptr is not None:
            mean, more = load_row(shift_ptr + head * D, D, HALF)
            shift = tl.sum(q_first.to(tl.float32) * mean, axis=1)
            shift += tl.sum(q_second.to(tl.float32) * more, axis=1)
            shift *= factor
        if scale_ptr is not None:
            scale, more = load_row(scale_ptr + head * D, D, HALF)
            scaled = q_first.to(tl.float32) * scale
            more = q_second.to(tl.float32) * more
            q_low, q_high = turn(scaled, more, signs_ptr, root, D, HALF, False, EXACT, ASM)
        else:
            q_low, q_high = turn(q_first, q_second, signs_ptr, root, D, HALF, False, EXACT, ASM)
        q_low = q_low.to(TYPE).to(MATH)
        q_high = q_high.to(TYPE).to(MATH)
        for t in tl.range(lowest // N * N, stop, N, num_stages=STAGES):
            block = tl.load(table_ptr + request * table_stride + t // BS).to(tl.int64)
            base = cache_ptr + block * block_stride + head * head_stride
            words = (base + BS * P).to(tl.pointer_type(tl.uint16)) + t % BS + n
            at = t + n
            inside = (at >= lowest) & (at < stop)
            codes = base + t % BS * HALF + n[None, :] * HALF + i[:, None]
            k_low, k_high = load_tile(codes, words, inside, HALF, KEY_GROUP, BS, N, TYPE, ASM)
            logits = tl.dot(q_low, k_low, input_precision="ieee")
            logits = tl.dot(q_high, k_high, logits, input_precision="ieee")
            logits = softcapped(logits * factor + shift[:, None], softcap, CAPPED)
            seen = (at[None, :] <= position[:, None]) & inside[None, :]
            if WINDOW > 0:
                seen = seen & (at[None, :] > position[:, None] - WINDOW)
            p, decay, best, total = soften(logits, seen, best, total)
            p = p.to(MATH)
            codes = base + BS * HALF + t % BS + n[None, :] + i[:, None] * BS
            words += P // KEY_GROUP * BS
            v_low, v_high = load_tile(codes, words, inside, HALF, VALUE_GROUP, BS, N, TYPE, ASM)
            first = tl.dot(p, tl.trans(v_low), first * decay[:, None], input_precision="ieee")
            second = tl.dot(p, tl.trans(v_high), second * decay[:, None], input_precision="ieee")
        first, second = turn(first, second, signs_ptr, root, D, HALF, True, EXACT, ASM)
    if RAW:
        # Loaded anew: kept during the other loop, they would not fit the registers.
        q_raw, q_more = load_head(query_rows, real, D, HALF)
        q_raw = q_raw.to(MATH)
        q_more = q_more.to(MATH)
        key = key_ptr + head * key_head_stride + start.to(tl.int64) * key_stride
        value = value_ptr + head * value_head_stride + start.to(tl.int64) * value_stride
        for t in tl.range(tl.maximum(lowest - past, 0), highest - past, N, num_stages=STAGES):
            at = t + n
            k_first, k_second = load_head(key + at.to(tl.int64) * key_stride, at < queries, D, HALF)
            logits = tl.dot(q_raw, tl.trans(k_first.to(MATH)), input_precision="ieee")
            logits = tl.dot(q_more, tl.trans(k_second.to(MATH)), logits, input_precision="ieee")
            logits = softcapped(logits * factor, softcap, CAPPED)
            seen = at[None, :] <= query[:, None]
            if WINDOW > 0:
                seen = seen & (at[None, :] > query[:, None] - WINDOW)
            p, decay, best, total = soften(logits, seen, best, total)
            p = p.to(MATH)
            rows_of = value + at.to(tl.int64) * value_stride
            v_first, v_second = load_head(rows_of, at < queries, D, HALF)
            first = tl.dot(p, v_first.to(MATH), first * decay[:, None], input_precision="ieee")
            second = tl.dot(p, v_second.to(MATH), second * decay[:, None], input_precision="ieee")
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + q_head, mask=real, other=0.0)
        decay, total = sink_weights(sinks, tl.zeros((M,), tl.float32), best, total)
        first *= decay[:, None]
        second *= decay[:, None]
    weight = (1.0 / total)[:, None]
    pointers = out_ptr + wide * out_stride + q_head * out_head_stride
    store_head(pointers, real, first * weight, second * weight, D, HALF)
