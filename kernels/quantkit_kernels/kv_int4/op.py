"""`quantkit::kv_int4_write`, `_attend`, `_prefill` and `_gather`: schemas, fakes and dispatch.

Arguments are checked by `checks`, one implementation per kind of device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from quantkit_kernels.devices import DISPATCH, backend
from quantkit_kernels.kv_int4 import checks
from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.treatment import Batch, KeyTreatment, Softmax

_LAYOUT = "int head_size, int block_size, int key_group, int value_group, bool value_columns"
_TREATMENT = "Tensor? shift, Tensor? scale"
_BATCH = (
    "Tensor block_table, Tensor seq_lens, Tensor query_start, "
    "SymInt max_query_len, SymInt max_seq_len"
)
_ATTENTION = (
    f"Tensor cache, Tensor(a!) out, {_BATCH}, {_LAYOUT}, {_TREATMENT}, "
    "float softmax_scale, int window, float softcap, Tensor? sinks"
)
SCHEMAS = {
    "kv_int4_write": f"(Tensor key, Tensor value, Tensor(a!) cache, Tensor slots, {_LAYOUT}, "
    f"{_TREATMENT}) -> ()",
    "kv_int4_attend": f"(Tensor query, {_ATTENTION}) -> ()",
    "kv_int4_prefill": f"(Tensor query, Tensor key, Tensor value, bool raw, {_ATTENTION}) -> ()",
    "kv_int4_gather": "(Tensor cache, Tensor blocks, SymInt start, SymInt stop, Tensor(a!) keys, "
    f"Tensor(b!) values, {_LAYOUT}) -> ()",
}
"""Op to its schema."""

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"quantkit::{_name}", _schema)


def write(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slots: Tensor,
    layout: CacheLayout,
    treatment: KeyTreatment,
) -> None:
    """cache[slots] = quantised ((key - shift) / scale) R and value R.

    Rows behind `slots` are padding, and so are those whose slot is negative.

    Args:
        key, value: float16, bfloat16 or float32 [tokens, kv_heads, head_size]; the last dimension
            is contiguous.
        cache: uint8 [blocks, kv_heads, block_size, token_bytes], written.
        slots: int64 [at most tokens], block * block_size + token within the block.
        layout: the cache's format.
        treatment: the keys' shift and scale.

    Raises:
        ValueError: the arguments do not fit together.
    """
    torch.ops.quantkit.kv_int4_write(key, value, cache, slots, *_fields(layout), *treatment)


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
    """out = softmax(scale * query . keys) values, causal, all keys and values from the cache.

    Made for few queries a request: decoding and the verification of drafts. A request's queries
    are its last positions, query head h reads KV head h // (heads / kv_heads), rows of no request
    are left alone.

    Args:
        query: float16, bfloat16 or float32 [tokens, heads, head_size]; the last dimension is
            contiguous.
        cache: uint8 [blocks, kv_heads, block_size, token_bytes].
        out: as query, written.
        batch: requests and their blocks. Blocks wholly outside the window may be any.
        layout: the cache's format.
        treatment: the keys' shift and scale, those they were written with.
        softmax: scale, window and softcap.
        sinks: float32 [heads], logits without a value, or None.

    Raises:
        ValueError: the arguments do not fit together.
    """
    how = *batch, *_fields(layout), *treatment, *softmax, sinks
    torch.ops.quantkit.kv_int4_attend(query, cache, out, *how)


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
    """`attend` for any number of queries a request, whose keys and values are at hand.

    Args:
        query, cache, out, batch, layout, treatment, softmax, sinks: as for `attend`; the cache has
            this step's tokens too.
        key, value: as query, [tokens, kv_heads, head_size].
        raw: this step's keys and values are `key` and `value`, only earlier ones are read from
            the cache. Else all are: results do not depend on how a prompt was cut into steps.

    Raises:
        ValueError: the arguments do not fit together.
    """
    how = *batch, *_fields(layout), *treatment, *softmax, sinks
    torch.ops.quantkit.kv_int4_prefill(query, key, value, raw, cache, out, *how)


def gather(
    cache: Tensor,
    blocks: Tensor,
    start: int,
    stop: int,
    keys: Tensor,
    values: Tensor,
    layout: CacheLayout,
) -> None:
    """keys[:stop - start], values[:stop - start] = one request's positions, still rotated.

    Args:
        cache: uint8 [blocks, kv_heads, block_size, token_bytes].
        blocks: int32 [n], the request's row of the block table.
        start, stop: positions.
        keys, values: float16, bfloat16 or float32 [at least stop - start, kv_heads, P], written.
        layout: the cache's format.

    Raises:
        ValueError: the arguments do not fit together.
    """
    torch.ops.quantkit.kv_int4_gather(cache, blocks, start, stop, keys, values, *_fields(layout))


Fields = tuple[int, int, int, int, bool]
"""What stands for a layout in a schema."""

Attention = tuple[
    *tuple[Tensor, Tensor, Tensor, int, int],  # batch
    *tuple[int, int, int, int, bool],  # layout
    *tuple[Tensor | None, Tensor | None],  # treatment
    *tuple[float, int, float],  # softmax
    *tuple[Tensor | None],  # sinks
]
"""What `attend` and `prefill` end with, from the block table on."""

Write = tuple[*Fields, Tensor | None, Tensor | None]
"""What `write` ends with: layout and treatment."""

Prefill = tuple[Tensor, Tensor, *Attention]
"""What `prefill` ends with: cache, out and `Attention`."""

Gather = tuple[Tensor, Tensor, *Fields]
"""What `gather` ends with: keys, values, layout."""

Parts = tuple[Batch, CacheLayout, KeyTreatment, Softmax, Tensor | None]
"""`Attention` as objects."""


def _fields(layout: CacheLayout) -> Fields:
    return (
        layout.head_size,
        layout.block_size,
        layout.key_group,
        layout.value_group,
        layout.value_columns,
    )


@lru_cache(maxsize=256)
def _layout(*fields: *Fields) -> CacheLayout:
    """The inverse of `_fields`."""
    return CacheLayout(*fields)


def _parts(how: Attention) -> Parts:
    treatment, softmax = KeyTreatment(*how[10:12]), Softmax(*how[12:15])
    return Batch(*how[:5]), _layout(*how[5:10]), treatment, softmax, how[15]


def _check_write(
    key: Tensor, value: Tensor, cache: Tensor, slots: Tensor, *how: *Write
) -> tuple[CacheLayout, KeyTreatment]:
    layout, treatment = _layout(*how[:5]), KeyTreatment(*how[5:])
    checks.check_write(key, value, cache, slots, layout, treatment)
    return layout, treatment


def _check_attend(query: Tensor, cache: Tensor, out: Tensor, *how: *Attention) -> Parts:
    parts = _parts(how)
    checks.check_attention(query, cache, out, *parts)
    return parts


def _check_prefill(query: Tensor, key: Tensor, value: Tensor, *how: *Prefill) -> Parts:
    parts = _check_attend(query, *how)
    checks.check_step(query, key, value, how[0], parts[1])
    return parts


def _check_gather(
    cache: Tensor, blocks: Tensor, start: int, stop: int, *how: *Gather
) -> CacheLayout:
    layout = _layout(*how[2:])
    checks.check_gather(cache, blocks, start, stop, how[0], how[1], layout)
    return layout


def _implementations(device_type: str) -> dict[str, Callable[..., None]]:
    """Op to what runs on a kind of device."""
    on_cpu = device_type == "cpu"

    def write(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor, *how: *Write) -> None:
        layout, treatment = _check_write(key, value, cache, slots, *how)
        if on_cpu:
            checks.check_slots(cache, slots, layout)
        backend("kv_int4", device_type).write(key, value, cache, slots, layout, treatment)

    def attend(query: Tensor, cache: Tensor, out: Tensor, *how: *Attention) -> None:
        parts = _check_attend(query, cache, out, *how)
        if on_cpu:
            checks.check_batch_values(parts[0], query, cache, parts[1])
        backend("kv_int4", device_type).attend(query, cache, out, *parts)

    def prefill(query: Tensor, key: Tensor, value: Tensor, raw: bool, *how: *Prefill) -> None:
        parts = _check_prefill(query, key, value, *how)
        if on_cpu:
            checks.check_batch_values(parts[0], query, how[0], parts[1])
        run = backend("kv_int4", device_type).prefill
        run(query, key, value, how[0], how[1], *parts, raw=raw)

    def gather(cache: Tensor, blocks: Tensor, start: int, stop: int, *how: *Gather) -> None:
        layout = _check_gather(cache, blocks, start, stop, *how)
        if on_cpu:
            checks.check_blocks(cache, blocks, stop, layout)
        run = backend("kv_int4", device_type).gather
        run(cache, blocks, start, stop, how[0], how[1], layout)

    return dict(zip(SCHEMAS, (write, attend, prefill, gather), strict=True))


for _device_type, _dispatch in DISPATCH.items():
    for _name, _function in _implementations(_device_type).items():
        torch.library.impl(f"quantkit::{_name}", _dispatch, _function)


@torch.library.register_fake("quantkit::kv_int4_write")
def _fake_write(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor, *how: *Write) -> None:
    _check_write(key, value, cache, slots, *how)


@torch.library.register_fake("quantkit::kv_int4_attend")
def _fake_attend(query: Tensor, cache: Tensor, out: Tensor, *how: *Attention) -> None:
    _check_attend(query, cache, out, *how)


@torch.library.register_fake("quantkit::kv_int4_prefill")
def _fake_prefill(query: Tensor, key: Tensor, value: Tensor, raw: bool, *how: *Prefill) -> None:
    _check_prefill(query, key, value, *how)


@torch.library.register_fake("quantkit::kv_int4_gather")
def _fake_gather(cache: Tensor, blocks: Tensor, start: int, stop: int, *how: *Gather) -> None:
    _check_gather(cache, blocks, start, stop, *how)
