"""Prompts on CPUs: vLLM's own kernel over 16-bit copies of what a few heads of a request read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from quantkit_kernels.kv_int4 import (
    KeyTreatment,
    gather,
    rotate_keys,
    rotate_queries,
    rotate_values,
    unrotate,
)
from quantkit_kernels.kv_int4.layout import DIMENSIONS
from vllm_quantkit.integration import compat
from vllm_quantkit.integration.kv_backend import Int4Impl, LayerAttention, treatment
from vllm_quantkit.integration.kv_steps import Pass

SCRATCH_BYTES = 64 << 20
"""What the copies take at most, unless one KV head of one request takes more."""

SCRATCH_BLOCK = 128
"""Tokens in a block of the copies."""

GATHERED = 1024
"""Tokens that are dequantised at a time, on their way to the copies."""


class Scratch:
    """Memory for keys and values in vLLM's layout, reused for every layer of a group."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def tokens(self, attention: LayerAttention, dtype: torch.dtype) -> int:
        """Tokens whose copies fit, all KV heads of them."""
        return SCRATCH_BYTES // (attention.kv_heads * _token_bytes(_padded(attention), dtype))

    def heads(self, one: Pass, attention: LayerAttention, size: int, dtype: torch.dtype) -> int:
        """KV heads of a pass whose copies fit, at least one."""
        head = one.blocks(SCRATCH_BLOCK) * SCRATCH_BLOCK * _token_bytes(size, dtype)
        return min(max(1, SCRATCH_BYTES // head), attention.kv_heads)

    def views(
        self, blocks: int, heads: int, size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, [blocks, heads, SCRATCH_BLOCK, size] each, holding anything."""
        shape = blocks, heads, 2 * SCRATCH_BLOCK, size
        count = blocks * heads * SCRATCH_BLOCK * _token_bytes(size, dtype)
        if self._memory.numel() < count:
            self._memory = torch.empty(count, dtype=torch.uint8)
        keys, values = self._memory[:count].view(dtype).view(shape).chunk(2, dim=2)
        return keys, values


@dataclass
class PromptStep:
    """What a step's layers share.

    Attributes:
        block_table: int32 [requests, blocks], where requests' tokens lie in the cache.
        scratch: for the copies.
        schedules: vLLM's work lists by pass and shape: layers alike share them.
    """

    block_table: Tensor
    scratch: Scratch
    schedules: dict[Any, Tensor] = field(default_factory=dict)


def attend_pass(
    impl: Int4Impl,
    layer: nn.Module,
    rows: tuple[Tensor, Tensor, Tensor],
    kv_cache: Tensor,
    shared: PromptStep,
    one: Pass,
    output: Tensor,
) -> None:
    """The outputs of a pass's requests, some KV heads at a time.

    What this step adds is read as it is; what was there before is read, rotated, from the cache.

    Args:
        impl: of the layer.
        layer: holds its keys' treatment.
        rows: the step's query [T, Hq, D], key and value [T, Hkv, D].
        kv_cache: of the layer.
        shared: of the step.
        one: the pass.
        output: [T, Hq, D], the pass's rows of it are written.
    """
    attention = impl.attention
    query, key, value = (tensor[one.first : one.last] for tensor in rows)
    plain = one.fresh and attention.head_size % DIMENSIONS == 0
    size = attention.head_size if plain else _padded(attention)
    step = shared.scratch.heads(one, attention, size, query.dtype)
    group = attention.heads // attention.kv_heads
    for start in range(0, attention.kv_heads, step):
        heads = slice(start, min(start + step, attention.kv_heads))
        queries = slice(heads.start * group, heads.stop * group)
        cut = _Cut(impl, layer, kv_cache[:, heads], heads, one, shared)
        some = query[:, queries], key[:, heads], value[:, heads]
        sinks = None if attention.sinks is None else attention.sinks[queries]
        output[one.first : one.last, queries] = cut.attend(*some, size, sinks)


class _Cut:
    """A pass of some KV heads."""

    def __init__(
        self,
        impl: Int4Impl,
        layer: nn.Module,
        kv_cache: Tensor,
        heads: slice,
        one: Pass,
        shared: PromptStep,
    ) -> None:
        self._attention, self._one, self._shared = impl.attention, one, shared
        self._cache, self._layout = kv_cache, impl.layout(kv_cache)
        whole = treatment(layer)
        self._treatment = KeyTreatment(*(None if t is None else t[heads] for t in whole))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, size: int, sinks: Tensor | None
    ) -> Tensor:
        """[t, heads, D] of query [t, heads, D], key and value [t, kv heads, D]."""
        blocks = self._one.blocks(SCRATCH_BLOCK)
        views = self._shared.scratch.views(blocks, key.shape[1], size, query.dtype)
        self._clear_ends(views)
        isa = _get_attn_isa(query.dtype, SCRATCH_BLOCK, size, "auto")
        if self._one.fresh:
            query, key, value = (_pad(tensor, size) for tensor in (query, key, value))
            ops.cpu_attn_reshape_and_cache(key, value, *views, self._slots(), isa)
        else:
            for keys, values, slots in self._pieces(key, value):
                ops.cpu_attn_reshape_and_cache(keys, values, *views, slots, isa)
            query = rotate_queries(query, self._treatment, query.dtype)
        out = self._run(query, views, isa, sinks)
        size = self._attention.head_size
        return out[..., :size] if self._one.fresh else unrotate(out, size, query.dtype)

    def _clear_ends(self, views: tuple[Tensor, Tensor]) -> None:
        """Zeros where a request's last block is not filled: a weight of 0 times NaN is NaN."""
        last = -1
        for extent in self._one.extents:
            last += -(-extent.tokens // SCRATCH_BLOCK)
            for view in views:
                view[last].zero_()

    def _slots(self) -> Tensor:
        """int64 [t], where the copies of fresh requests lie: each begins a block."""
        slots, block = [], 0
        for extent in self._one.extents:
            start = block * SCRATCH_BLOCK
            slots.append(torch.arange(start, start + extent.tokens))
            block += -(-extent.tokens // SCRATCH_BLOCK)
        return torch.cat(slots)

    def _pieces(self, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rotated keys and values of one request, and where their copies lie."""
        (extent,) = self._one.extents
        shift, missing = self._shifts()
        for start in range(extent.start, extent.context, GATHERED):
            stop = min(start + GATHERED, extent.context)
            keys, values = self._gathered(extent.request, start, stop, key)
            slots = torch.arange(start - extent.start, stop - extent.start)
            yield keys if missing is None else keys.add_(missing), values, slots
        keys = rotate_keys(key, self._treatment._replace(shift=shift), key.dtype)
        slots = torch.arange(extent.context - extent.start, extent.tokens)
        yield keys, rotate_values(value, value.dtype), slots

    def _gathered(self, request: int, start: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = stop - start, like.shape[1], self._layout.padded_size
        keys, values = (torch.empty(shape, dtype=like.dtype) for _ in range(2))
        blocks = self._shared.block_table[request]
        gather(self._cache, blocks, start, stop, keys, values, self._layout)
        return keys, values

    def _shifts(self) -> tuple[Tensor | None, Tensor | None]:
        """What to take from this step's keys, and what to add to those of the cache, rotated.

        A softmax does not see q . mu, so keys stay shifted: their rounding to 16 bits is finer.
        Caps and sinks do see it, so that there the cache's keys get their mean back.
        """
        shift, scale = self._treatment
        seen = self._attention.softmax.softcap or self._attention.sinks is not None
        if shift is None or not seen:
            return shift, None
        return None, rotate_keys(shift[None], KeyTreatment(None, scale))

    def _run(
        self, query: Tensor, views: tuple[Tensor, Tensor], isa: str, sinks: Tensor | None
    ) -> Tensor:
        softmax, out = self._attention.softmax, torch.empty_like(query.contiguous())
        where = self._where()
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=views[0],
            value_cache=views[1],
            output=out,
            **where,
            scale=softmax.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=softmax.window or -1,
            softcap=softmax.softcap,
            scheduler_metadata=self._schedule(query, views[0], isa, where),
            s_aux=None if sinks is None else compat.cpu_sinks(sinks),
        )
        return out

    def _where(self) -> dict[str, Tensor]:
        """Rows, tokens and blocks of the pass's requests."""
        rows, tokens, firsts, block = [0], [], [], 0
        for extent in self._one.extents:
            rows.append(rows[-1] + extent.queries)
            tokens.append(extent.tokens)
            firsts.append(block)
            block += -(-extent.tokens // SCRATCH_BLOCK)
        width = -(-max(tokens) // SCRATCH_BLOCK)
        first = torch.tensor(firsts, dtype=torch.int32)
        return {
            "query_start_loc": torch.tensor(rows, dtype=torch.int32),
            "seq_lens": torch.tensor(tokens, dtype=torch.int32),
            "block_table": first[:, None] + torch.arange(width, dtype=torch.int32),
        }

    def _schedule(self, query: Tensor, keys: Tensor, isa: str, where: dict[str, Tensor]) -> Any:
        """vLLM's division of the work among threads."""
        window, shape = self._attention.softmax.window, (query.shape[1], *keys.shape[1::2])
        name = (self._one, *shape, window, query.dtype)
        known = self._shared.schedules
        if name not in known:
            known[name] = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(where["seq_lens"]),
                num_heads=shape[0],
                num_kv_heads=shape[1],
                head_dim=shape[2],
                seq_lens=where["seq_lens"],
                dtype=query.dtype,
                query_start_loc=where["query_start_loc"],
                causal=True,
                sliding_window_size=window or -1,
                isa=isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            )
        return known[name]


def _padded(attention: LayerAttention) -> int:
    return -(-attention.head_size // DIMENSIONS) * DIMENSIONS


def _pad(heads: Tensor, size: int) -> Tensor:
    missing = size - heads.shape[-1]
    return functional.pad(heads, (0, missing)) if missing else heads


def _token_bytes(size: int, dtype: torch.dtype) -> int:
    """Of a key and a value."""
    return 2 * size * dtype.itemsize
