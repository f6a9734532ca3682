"""The oracle: the cache and attention over it in float32, token by token, from the definitions.

A group y of a rotated key or value becomes codes and a word:

    lo = min(min(y), 0), hi = max(max(y), 0)
    s_0 = max((hi - lo) / 15, 2^-14), rounded up to a float16 with 6 bits of mantissa
    s_i = the i-th such float16 below s_0, but not below 2^-14, for i < 8
    z = clamp(rint(-lo / s), 0, 15)
    code = clamp(rint(y / s) + z, 0, 15), value = (code - z) * s

with that s, the first of those, whose values have the least sum of squared errors: 7 % less than
those of s_0 on normal values, for the writer's time alone.
Roundings are half to even. A group that is not finite, or whose s_0 no float16 holds, gets the
scale NaN: whatever reads it becomes NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.rotation import (
    rotate_keys,
    rotate_queries,
    rotate_values,
    shift_products,
    unrotate,
)
from quantkit_kernels.kv_int4.treatment import Batch, KeyTreatment, Softmax

LARGEST_CODE = 15

SMALLEST_SCALE = 2.0**-14
"""The smallest normal float16: what a group of zeros has."""

LARGEST_SCALE = 65024.0
"""The largest float16 with 6 bits of mantissa."""

NAN_WORD = 0x7E00
"""The word of a group that cannot be represented: NaN, zero-point 0."""

SCALES = 8
"""Of those that are tried for a group: more than 8 gain nothing that could be measured."""

DROPPED_BITS = 17
"""Of float32's 23 bits of mantissa, those that a scale does without."""


def quantise(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes and words of rotated keys or values.

    Args:
        values: float [..., P].
        group: dimensions that share a word; divides P.

    Returns:
        uint8 [..., P], each 0 to 15, and int16 [..., P / group].
    """
    groups = values.float().unflatten(-1, (-1, group))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    largest = _rounded_up(((high - low) / LARGEST_CODE).clamp_min(SMALLEST_SCALE))
    good = groups.isfinite().all(-1) & (largest <= LARGEST_SCALE)
    groups = groups.masked_fill(~good[..., None], 0)
    negative_low, largest = -low.masked_fill(~good, 0), largest.masked_fill(~good, 1)
    grid = _grid(groups, negative_low, largest)
    for step in range(1, SCALES):
        scales = _smaller(largest, step).clamp_min(SMALLEST_SCALE)
        grid = _better(grid, _grid(groups, negative_low, scales))
    words = grid.scales.half().view(torch.int16) | grid.zeros.to(torch.int16)
    codes = grid.codes.masked_fill(~good[..., None], 0)
    return codes.to(torch.uint8).flatten(-2), words.masked_fill(~good, NAN_WORD)


def dequantise(codes: Tensor, words: Tensor) -> Tensor:
    """value = (code - zero) * scale, float32 [..., P].

    Args:
        codes: uint8 [..., P].
        words: int16 [..., P / group].
    """
    groups = codes.unflatten(-1, (words.shape[-1], -1)).float()
    zeros = (words & 15).float()[..., None]
    scales = (words & ~15).view(torch.float16).float()[..., None]
    values: Tensor = (groups - zeros) * scales
    return values.flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """Bytes, uint8 [..., P / 2]: code i in the low nibble of byte i, code i + P / 2 in the high."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def unpack(packed: Tensor) -> Tensor:
    """Codes, uint8 [..., P]: the inverse of `pack`."""
    return torch.cat((packed & 15, packed >> 4), -1)


def write(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slots: Tensor,
    layout: CacheLayout,
    treatment: KeyTreatment,
) -> None:
    """As `op.write`."""
    planes = layout.planes(cache)
    value_codes = planes.value_codes.mT if layout.value_columns else planes.value_codes
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, token = divmod(slot, layout.block_size)
        keys = quantise(rotate_keys(key[row : row + 1], treatment)[0], layout.key_dimensions)
        values = quantise(rotate_values(value[row : row + 1])[0], layout.value_dimensions)
        planes.key_codes[block, :, token] = pack(keys[0])
        planes.key_words[block, :, :, token] = keys[1]
        value_codes[block, :, token] = pack(values[0])
        planes.value_words[block, :, :, token] = values[1]


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
    planes = layout.planes(cache)
    value_codes = planes.value_codes.mT if layout.value_columns else planes.value_codes
    for row, position in enumerate(range(start, stop)):
        block, token = int(blocks[position // layout.block_size]), position % layout.block_size
        for rows, codes, words in (
            (keys, planes.key_codes, planes.key_words),
            (values, value_codes, planes.value_words),
        ):
            rows[row] = dequantise(unpack(codes[block, :, token]), words[block, :, :, token])


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
    no_rows = query.new_empty(0, cache.shape[1], layout.head_size)
    arguments = (query, no_rows, no_rows, cache, out, batch, layout, treatment, softmax, sinks)
    prefill(*arguments, raw=False)


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
        for row in range(span.begin, span.end):
            position = span.length - (span.end - row)
            lowest = max(0, position - softmax.window + 1) if softmax.window else 0
            seen = slice(lowest - span.first, position + 1 - span.first)
            for head in range(query.shape[1]):
                kv_head = head * cache.shape[1] // query.shape[1]
                attended = _attended(
                    treated[row, head],
                    keys[seen, kv_head],
                    values[seen, kv_head],
                    0 if extra is None else extra[row, head],
                    softmax,
                    None if sinks is None else sinks[head],
                )
                out[row, head] = unrotate(attended, layout.head_size, out.dtype)


class Span(NamedTuple):
    """A request's rows and positions.

    Attributes:
        request: its row in the batch's tables.
        begin, end: rows of its queries.
        first: the first position that one of its queries sees.
        cached: positions before it are read from the cache, the others from keys and values.
        length: its tokens.
    """

    request: int
    begin: int
    end: int
    first: int
    cached: int
    length: int


def spans(batch: Batch, window: int, raw: bool) -> Iterator[Span]:
    """The requests of a batch that are no padding. Reads the batch's tensors on the host."""
    starts = batch.query_start.tolist()
    for request, length in enumerate(batch.seq_lens.tolist()):
        begin, end = starts[request : request + 2]
        before = length - (end - begin)
        if length and begin < end:
            first = max(0, before - window + 1) if window else 0
            yield Span(request, begin, end, first, before if raw else length, length)


def context(
    span: Span,
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    batch: Batch,
    layout: CacheLayout,
    treatment: KeyTreatment,
    read: Callable[..., None],
) -> tuple[Tensor, Tensor]:
    """Rotated keys and values, float32 [length - first, kv_heads, P], that a request attends to.

    Args:
        read: what gathers from the cache.
    """
    keys, values = (
        torch.empty(
            span.length - span.first, cache.shape[1], layout.padded_size, device=cache.device
        )
        for _ in "kv"
    )
    blocks = batch.block_table[span.request]
    read(cache, blocks, span.first, span.cached, keys, values, layout)
    new = slice(span.begin, span.begin + span.length - span.cached)
    keys[span.cached - span.first :] = rotate_keys(key[new], treatment)
    values[span.cached - span.first :] = rotate_values(value[new])
    return keys, values


def _attended(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    extra: Tensor | float,
    softmax: Softmax,
    sink: Tensor | None,
) -> Tensor:
    """o' = sum_j p_j v'_j, [P], of one query [P] over the keys and values [n, P] it sees."""
    logits = softmax.scale * (keys @ query + extra)
    if softmax.softcap:
        logits = softmax.softcap * torch.tanh(logits / softmax.softcap)
    if sink is not None:
        logits = torch.cat((logits, sink[None]))
    return logits.softmax(0)[: len(values)] @ values


class _Grid(NamedTuple):
    """Groups on a grid: scales, zeros and squared errors [...], codes float32 [..., group]."""

    scales: Tensor
    zeros: Tensor
    codes: Tensor
    errors: Tensor


def _grid(groups: Tensor, negative_low: Tensor, scales: Tensor) -> _Grid:
    """The nearest codes at these scales."""
    zeros = torch.round(negative_low / scales).clamp(0, LARGEST_CODE)
    codes = torch.round(groups / scales[..., None]) + zeros[..., None]
    codes = codes.clamp(0, LARGEST_CODE)
    values = (codes - zeros[..., None]) * scales[..., None]
    return _Grid(scales, zeros, codes, (values - groups).square().sum(-1))


def _better(first: _Grid, second: _Grid) -> _Grid:
    """Group by group the one with the smaller error, the first where they agree."""
    take = second.errors < first.errors
    pairs = zip(second, first, strict=True)
    return _Grid(
        *(torch.where(take if a.dim() == take.dim() else take[..., None], a, b) for a, b in pairs)
    )


def _rounded_up(scales: Tensor) -> Tensor:
    """Float32 whose mantissa has 6 bits, not below `scales`, which are positive or NaN."""
    below = (1 << DROPPED_BITS) - 1
    return ((scales.view(torch.int32) + below) & ~below).view(torch.float32)


def _smaller(scales: Tensor, steps: int) -> Tensor:
    """Float32 with 6 bits of mantissa, so many of them below `scales`."""
    return (scales.view(torch.int32) - (steps << DROPPED_BITS)).view(torch.float32)
