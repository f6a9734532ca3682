"""Any device: the cache and attention over it in ATen, request by request. Correct, not fast."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.reference import (
    Span,
    context,
    dequantise,
    pack,
    quantise,
    spans,
    unpack,
)
from quantkit_kernels.kv_int4.rotation import (
    rotate_keys,
    rotate_queries,
    rotate_values,
    shift_products,
    unrotate,
)
from quantkit_kernels.kv_int4.treatment import Batch, KeyTreatment, Softmax

_LOGITS = 1 << 24
"""Logits that exist at the same time: a long prompt's queries attend some at a time."""


def write(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slots: Tensor,
    layout: CacheLayout,
    treatment: KeyTreatment,
) -> None:
    """As `op.write`."""
    used = slots >= 0
    rows, slots = used.nonzero().flatten(), slots[used]
    block = torch.div(slots, layout.block_size, rounding_mode="floor")
    token = slots - block * layout.block_size
    planes = layout.planes(cache)
    codes, words = quantise(rotate_keys(key[rows], treatment), layout.key_dimensions)
    planes.key_codes[block, :, token] = pack(codes)
    planes.key_words[block, :, :, token] = words
    codes, words = quantise(rotate_values(value[rows]), layout.value_dimensions)
    _token_major(planes.value_codes, layout)[block, :, token] = pack(codes)
    planes.value_words[block, :, :, token] = words


def gather(
    cache: Tensor,
    blocks: Tensor,
    start: int,
    stop: int,
    keys: Tensor,
    values: Tensor,
    layout: CacheLayout,
) -> None:
    """As `op.gather`."""
    size = layout.block_size
    before = start // size
    used = blocks[before : -(-stop // size)]
    planes = layout.planes(cache)
    for rows, codes, words in (
        (keys, planes.key_codes, planes.key_words),
        (values, _token_major(planes.value_codes, layout), planes.value_words),
    ):
        heads = dequantise(unpack(codes[used]), words[used].transpose(2, 3))
        tokens = heads.transpose(1, 2).flatten(0, 1)
        rows[: stop - start] = tokens[start - before * size : stop - before * size]


def attend(
    query: Tensor,
    cache: Tensor,
    out: Tensor,
    batch: Batch,
    layout: CacheLayout,
    treatment: KeyTreatment,
    softmax: Softmax,
    sinks: Tensor | None = None,
) -> None:
    """As `op.attend`."""
    none = query.new_empty(0, cache.shape[1], layout.head_size)
    prefill(query, none, none, cache, out, batch, layout, treatment, softmax, sinks, raw=False)


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    out: Tensor,
    batch: Batch,
    layout: CacheLayout,
    treatment: KeyTreatment,
    softmax: Softmax,
    sinks: Tensor | None = None,
    *,
    raw: bool = True,
) -> None:
    """As `op.prefill`."""
    treated, extra = rotate_queries(query, treatment), shift_products(query, treatment)
    for span in spans(batch, softmax.window, raw):
        keys, values = context(span, key, value, cache, batch, layout, treatment, gather)
        step = max(1, _LOGITS // (query.shape[1] * len(keys)))
        for begin in range(span.begin, span.end, step):
            rows = slice(begin, min(begin + step, span.end))
            products = _products(treated[rows], keys)
            if extra is not None:
                products = products + extra[rows, :, None]
            probabilities = _probabilities(products, _seen(span, rows, softmax), softmax, sinks)
            attended = _weighted(probabilities, values)
            out[rows] = unrotate(attended, layout.head_size, out.dtype)


def _token_major(value_codes: Tensor, layout: CacheLayout) -> Tensor:
    """Value codes as [blocks, heads, block_size, half]."""
    return value_codes.mT if layout.value_columns else value_codes


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """q . k, [queries, heads, n] of queries [queries, heads, P] and keys [n, kv_heads, P]."""
    grouped = query.unflatten(1, (keys.shape[1], -1))
    return torch.einsum("qhgp,nhp->qhgn", grouped, keys).flatten(1, 2)


def _weighted(probabilities: Tensor, values: Tensor) -> Tensor:
    """sum_j p_j v_j, [queries, heads, P]."""
    grouped = probabilities.unflatten(1, (values.shape[1], -1))
    return torch.einsum("qhgn,nhp->qhgp", grouped, values).flatten(1, 2)


def _seen(span: Span, rows: slice, softmax: Softmax) -> Tensor:
    """Whether a query sees a position, bool [queries, n]."""
    queries = torch.arange(rows.start, rows.stop) + span.length - span.end
    positions = torch.arange(span.first, span.length)
    seen = positions <= queries[:, None]
    if softmax.window:
        seen &= positions > queries[:, None] - softmax.window
    return seen


def _probabilities(
    products: Tensor, seen: Tensor, softmax: Softmax, sinks: Tensor | None
) -> Tensor:
    """Softmax over the positions that are seen, [queries, heads, n]."""
    logits = softmax.scale * products
    if softmax.softcap:
        logits = softmax.softcap * torch.tanh(logits / softmax.softcap)
    logits = logits.masked_fill(~seen.to(logits.device)[:, None], -torch.inf)
    if sinks is None:
        return logits.softmax(-1)
    sink = sinks[None, :, None].expand(len(logits), -1, 1)
    return torch.cat((logits, sink), -1).softmax(-1)[..., :-1]
