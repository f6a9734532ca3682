"""Requests in a cache whose other bytes are NaN, for the kernels in the interpreter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import Batch, CacheLayout, KeyTreatment, Softmax, generic

HEADS = 2


class Case(NamedTuple):
    """A cache with requests, and this step's queries, keys and values."""

    layout: CacheLayout
    cache: Tensor
    batch: Batch
    query: Tensor
    key: Tensor
    value: Tensor
    treatment: KeyTreatment


def layout_of(head_size: int, **options: Any) -> CacheLayout:
    return CacheLayout(head_size, options.pop("block_size", 64), value_columns=True, **options)


def treatment_of(head_size: int) -> KeyTreatment:
    """A mean larger than what varies, and scales either side of 1."""
    return KeyTreatment(3 * torch.randn(HEADS, head_size), torch.rand(HEADS, head_size) + 0.5)


def make(
    layout: CacheLayout,
    lengths: list[int],
    queries: list[int],
    group: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    treated: bool = False,
    window: int = 0,
) -> Case:
    """Requests in shuffled blocks; bytes of no token, and blocks behind the window, read as NaN."""
    size = layout.head_size
    treatment = treatment_of(size) if treated else KeyTreatment()
    counts = [-(-length // layout.block_size) for length in lengths]
    cache = torch.full((sum(counts) + 1, HEADS, layout.block_size, layout.token_bytes), 0xFF)
    cache = cache.to(torch.uint8)
    free = (torch.randperm(sum(counts)) + 1).to(torch.int32)
    table = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    keys, values = [], []
    for request, (length, count) in enumerate(zip(lengths, queries, strict=True)):
        row = free[sum(counts[:request]) :][: counts[request]]
        table[request, : len(row)] = row
        position = torch.arange(length)
        slots = row[position // layout.block_size].long() * layout.block_size
        key, value = torch.randn(2, length, HEADS, size).to(dtype)
        if treatment.shift is not None:
            key = (key + treatment.shift).to(dtype)
        where = slots + position % layout.block_size
        generic.write(key, value, cache, where, layout, treatment)
        keys.append(key[length - min(count, length) :])
        values.append(value[length - min(count, length) :])
        if window:
            seen = max(0, length - count - window + 1)
            table[request, : seen // layout.block_size] = 0
    start = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    sizes = torch.tensor(lengths, dtype=torch.int32)
    batch = Batch(table, sizes, start, max(queries), max(lengths))
    query = torch.randn(sum(queries), HEADS * group, size).to(dtype)
    return Case(layout, cache, batch, query, torch.cat(keys), torch.cat(values), treatment)


def room_for(query: Tensor) -> Tensor:
    """Rows of NaN, two more than queries."""
    return torch.full((len(query) + 2, *query.shape[1:]), float("nan"), dtype=query.dtype)


def softmax_of(case: Case, **options: Any) -> Softmax:
    return Softmax(case.layout.head_size**-0.5, **options)
