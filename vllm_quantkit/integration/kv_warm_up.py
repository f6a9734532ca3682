"""Kernels are compiled when the engine starts: the first request does not wait for them.

The builders of an attention's metadata are made when the cache is, before CUDA graphs are captured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import Batch, CacheLayout, attend, gather, prefill, write
from vllm_quantkit.integration.kv_backend import Int4Impl, treatment
from vllm_quantkit.integration.kv_steps import BOUNDS

PROMPTS = tuple(1 << power for power in range(8))
"""Queries of a request: one for each tile that `prefill` has, whatever the heads of a group."""


@dataclass(frozen=True)
class Scratch:
    """What a layer's ops are run on: a cache of one block that is all blocks of one request."""

    layer: Any
    layout: CacheLayout
    cache: Tensor
    rows: Tensor

    @property
    def heads(self) -> Tensor:
        """Keys, or values, of the rows."""
        return self.rows[:, : self.cache.shape[1]]

    def batch(self, queries: int) -> Batch:
        """The request with so many queries and no context."""
        device, length = self.rows.device, torch.tensor([queries], dtype=torch.int32)
        blocks = -(-queries // self.layout.block_size)
        table = torch.zeros(1, blocks, dtype=torch.int32, device=device)
        starts = torch.tensor([0, queries], dtype=torch.int32, device=device)
        return Batch(table, length.to(device), starts, queries, queries)

    def tail(self, queries: int) -> tuple[Any, ...]:
        """What `attend` and `prefill` both end with."""
        attention = self.layer.impl.attention
        sinks = None if attention.sinks is None else attention.sinks.float()
        return self.batch(queries), self.layout, treatment(self.layer), attention.softmax, sinks

    def write(self) -> None:
        """Quantise all rows."""
        slots = torch.arange(len(self.rows), device=self.rows.device) % self.layout.block_size
        write(self.heads, self.heads, self.cache, slots, self.layout, treatment(self.layer))

    def attend(self, queries: int) -> None:
        """Decode so many."""
        query = self.rows[:queries]
        attend(query, self.cache, torch.empty_like(query), *self.tail(queries))

    def prefill(self, queries: int) -> None:
        """A prompt of so many."""
        query, heads = self.rows[:queries], self.heads[:queries]
        out, raw = torch.empty_like(query), not self.layer.impl.attention.cached
        prefill(query, heads, heads, self.cache, out, *self.tail(queries), raw=raw)


def scratch_of(
    layer: Any, block_size: int, rows: int, dtype: torch.dtype, device: torch.device
) -> Scratch:
    """Zeros for `rows` tokens."""
    impl: Int4Impl = layer.impl
    attention = impl.attention
    layout = attention.groups.layout(attention.head_size, block_size, columns=impl.columns)
    shape = 1, attention.kv_heads, block_size, layout.token_bytes
    cache = torch.zeros(shape, dtype=torch.uint8, device=device)
    queries = torch.zeros(rows, attention.heads, attention.head_size, dtype=dtype, device=device)
    return Scratch(layer, layout, cache, queries)


def warm_up_cpu(layer: Any, block_size: int, dtype: torch.dtype) -> None:
    """Run every op once as the attention layer will on a CPU."""
    scratch = scratch_of(layer, block_size, BOUNDS[-1], dtype, torch.device("cpu"))
    scratch.write()
    for queries in BOUNDS:
        scratch.attend(queries)
    layout, heads = scratch.layout, scratch.heads
    copies = torch.empty(2, *heads.shape[:2], layout.padded_size, dtype=dtype)
    table = scratch.batch(1).block_table
    gather(scratch.cache, table[0], 0, len(heads), copies[0], copies[1], layout)


def warm_up_gpu(
    layer: Any, block_size: int, dtype: torch.dtype, device: torch.device, decoded: Iterable[int]
) -> None:
    """Run every op once as the attention layer will on a GPU.

    Args:
        layer: its keys' treatment and sinks lie on the device.
        block_size: tokens in a block of the kernels.
        dtype: of queries.
        device: the GPU.
        decoded: numbers of queries for which a request counts as decoding.
    """
    scratch = scratch_of(layer, block_size, PROMPTS[-1], dtype, device)
    scratch.write()
    for queries in decoded:
        scratch.attend(queries)
    for queries in PROMPTS:
        scratch.prefill(queries)
