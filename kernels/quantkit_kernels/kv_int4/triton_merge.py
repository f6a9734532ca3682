# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel: what the splits of a request found, added up and rotated back."""

import triton
import triton.language as tl

from quantkit_kernels.kv_int4.triton_codes import LOG2_E, MASKED
from quantkit_kernels.kv_int4.triton_decode import span_of
from quantkit_kernels.kv_int4.triton_rotate import store_head, turn


@triton.jit
def sink_weights(sinks, shift, best, total):
    """What sums [R] and the total of exponentials are multiplied by, and that total, with sinks.

    Args:
        sinks: logits without a value, [R].
        shift: what the logits behind `best` lack, to base 2.
        best, total: the largest logit so far, to base 2, and sum of 2 ** (logit - best).
    """
    sinks = sinks * LOG2_E - shift
    top = tl.maximum(best, sinks)
    decay = tl.exp2(best - top)
    return decay, total * decay + tl.exp2(sinks - top)


@triton.jit(do_not_specialize=["tokens", "splits"])
def merge_splits(
    partial_ptr,
    lse_ptr,
    shift_ptr,
    sinks_ptr,
    signs_ptr,
    lengths_ptr,
    starts_ptr,
    out_ptr,
    tokens,
    q_heads,
    out_stride,
    out_head_stride,
    splits,
    root,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    WINDOW: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    ASM: tl.constexpr,
):
    """out = (sum_s 2 ** lse[s] partial[s] / (sum_s 2 ** lse[s] + e ** sink)) R^T.

    Splits are added in the order of s.

    Programs are (request, query, KV head).

    Args:
        partial_ptr: float32 [splits, tokens, q_heads, 2 HALF].
        lse_ptr: float32 [splits, tokens, q_heads].
        shift_ptr: float32 [tokens, q_heads], what logits lack, to base 2, or None.
        sinks_ptr: float32 [q_heads] or None.
        signs_ptr: bfloat16 [D, 2 HALF].
        lengths_ptr, starts_ptr: int32 [requests], [requests + 1].
        out_ptr: [tokens, q_heads, D].
        R: G rounded up to what tensor cores take.
    """
    HP: tl.constexpr = triton.next_power_of_2(HALF)
    request = tl.program_id(0)
    length = tl.load(lengths_ptr + request)
    start = tl.load(starts_ptr + request)
    queries = tl.load(starts_ptr + request + 1) - start
    if (tl.program_id(1) >= queries) | (length <= 0):
        return
    first, share = span_of(length, queries, splits, WINDOW, N)
    token = start + tl.program_id(1)
    g = tl.arange(0, R)
    head = tl.program_id(2) * G + g
    real = g < G
    row = token * q_heads + head
    i = tl.arange(0, HP)
    inside = real[:, None] & (i < HALF)[None, :]
    best = tl.full((R,), MASKED, tl.float32)
    total = tl.zeros((R,), tl.float32)
    low = tl.zeros((R, HP), tl.float32)
    high = tl.zeros((R, HP), tl.float32)
    for split in range(tl.cdiv(length - first, share)):
        at = (split * tokens).to(tl.int64) * q_heads + row
        lse = tl.load(lse_ptr + at, mask=real, other=0.0)
        part = partial_ptr + at[:, None] * (2 * HALF) + i[None, :]
        top = tl.maximum(best, lse)
        decay = tl.exp2(best - top)
        weight = tl.exp2(lse - top)
        total = total * decay + weight
        low = low * decay[:, None] + weight[:, None] * tl.load(part, mask=inside, other=0.0)
        part += HALF
        high = high * decay[:, None] + weight[:, None] * tl.load(part, mask=inside, other=0.0)
        best = top
    if sinks_ptr is not None:
        shift = tl.zeros((R,), tl.float32)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + row, mask=real, other=0.0)
        sinks = tl.load(sinks_ptr + head, mask=real, other=0.0)
        decay, total = sink_weights(sinks, shift, best, total)
        low *= decay[:, None]
        high *= decay[:, None]
    scaled = root / total
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    first, second = turn(low, high, signs_ptr, 1.0, D, HALF, True, EXACT, ASM)
    out = out_ptr + token.to(tl.int64) * out_stride + head * out_head_stride
    store_head(out, real, first * scaled[:, None], second * scaled[:, None], D, HALF)
