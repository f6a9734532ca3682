"""Kernels are compiled when the engine starts: the first request does not wait for them."""

from __future__ import annotations

from typing import Any

import torch

from quantkit_kernels.kv_int4 import Batch, attend, gather, write
from vllm_quantkit.integration.kv_backend import Int4Impl, treatment
from vllm_quantkit.integration.kv_steps import BOUNDS


def warm_up(layer: Any, block_size: int, dtype: torch.dtype) -> None:
    """Run every op once as the attention layer will, over a block of its own."""
    impl: Int4Impl = layer.impl
    attention, keys = impl.attention, treatment(layer)
    layout = attention.groups.layout(attention.head_size, block_size, columns=impl.columns)
    cache = torch.zeros(1, attention.kv_heads, block_size, layout.token_bytes, dtype=torch.uint8)
    rows = torch.zeros(BOUNDS[-1], attention.heads, attention.head_size, dtype=dtype)
    heads = rows[:, : attention.kv_heads]
    write(heads, heads, cache, torch.arange(len(rows)), layout, keys)
    table = torch.zeros(1, 1, dtype=torch.int32)
    for most in BOUNDS:
        tokens = torch.tensor([most], dtype=torch.int32)
        batch = Batch(table, tokens, torch.tensor([0, most], dtype=torch.int32), most, most)
        sinks = None if attention.sinks is None else torch.zeros(attention.heads)
        out = torch.empty_like(rows[:most])
        attend(rows[:most], cache, out, batch, layout, keys, attention.softmax, sinks)
    copies = torch.empty(2, len(rows), attention.kv_heads, layout.padded_size, dtype=dtype)
    gather(cache, table[0], 0, len(rows), copies[0], copies[1], layout)
