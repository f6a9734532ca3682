"""What the ops refuse. What reads values says so: on CUDA it would wait for the GPU."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantkit_kernels.devices import check_activations
from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.treatment import Batch, KeyTreatment, Softmax

Array = npt.NDArray[np.int32]


def check_treatment(treatment: KeyTreatment, kv_heads: int, head_size: int) -> None:
    """Shift and scale are float32 [kv_heads, head_size]. Reads no values.

    Raises:
        ValueError: they are not.
    """
    for name, given in treatment._asdict().items():
        if given is not None and (
            given.dtype != torch.float32 or given.shape != (kv_heads, head_size)
        ):
            raise ValueError(
                f"the keys' {name} is {given.dtype} {tuple(given.shape)}; the cache needs "
                f"torch.float32 ({kv_heads}, {head_size}), one number per KV head and dimension"
            )


def check_treatment_values(treatment: KeyTreatment) -> None:
    """Shift and scale are finite, and the scale is positive. Reads values: for when a model loads.

    Raises:
        ValueError: they are not.
    """
    fix = "calibrate again, or leave the {} out"
    for name, given in treatment._asdict().items():
        if given is not None and not bool(given.isfinite().all()):
            bad = given[~given.isfinite()][0].item()
            raise ValueError(
                f"the keys' {name} holds {bad}; all its numbers are finite: {fix.format(name)}"
            )
    if treatment.scale is not None and not bool((treatment.scale > 0).all()):
        raise ValueError(
            f"the keys' scale holds {treatment.scale.min().item()}; all its numbers are "
            f"positive: {fix.format('scale')}"
        )


def check_batch(batch: Batch) -> None:
    """Shapes and dtypes of a batch fit together. Reads no values.

    Raises:
        ValueError: they do not.
    """
    table, requests = batch.block_table, len(batch.seq_lens)
    shapes = {
        "block_table": (table, (requests, *table.shape[1:2])),
        "seq_lens": (batch.seq_lens, (requests,)),
        "query_start": (batch.query_start, (requests + 1,)),
    }
    for name, (given, shape) in shapes.items():
        if given.dtype != torch.int32 or given.shape != shape or table.dim() != 2:
            raise ValueError(
                f"{name} is {given.dtype} {tuple(given.shape)}; a batch of {requests} requests "
                "needs torch.int32: block_table (requests, blocks), seq_lens (requests,), "
                "query_start (requests + 1,)"
            )
        if given.shape[-1] > 1 and given.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {given.stride()}; its rows must be contiguous: copy it"
            )
    for name, bound in (("max_query_len", batch.max_query_len), ("max_seq_len", batch.max_seq_len)):
        if bound < 0:
            raise ValueError(f"{name} is {bound}; give an upper bound of at least 0")


def check_batch_values(batch: Batch, query: Tensor, cache: Tensor, layout: CacheLayout) -> None:
    """Rows and positions of a batch lie in what is given. Reads values: for the CPU only.

    In numpy: every layer of every step comes here, with arrays of a few numbers.

    Raises:
        ValueError: they do not.
    """
    if not batch.seq_lens.shape[0]:
        return
    lengths, table = batch.seq_lens.numpy(), batch.block_table.numpy()
    _check_rows(batch.query_start.numpy(), lengths, batch.max_query_len, query.shape[0])
    capacity, longest = table.shape[1] * layout.block_size, int(lengths.max())
    if longest > capacity:
        raise ValueError(
            f"a request has {longest} tokens, but its row of block_table holds {capacity}; "
            "give it more blocks"
        )
    if longest > batch.max_seq_len:
        raise ValueError(
            f"a request has {longest} tokens, but max_seq_len is {batch.max_seq_len}; "
            "give an upper bound"
        )
    used = -(-lengths // layout.block_size)
    _check_exist(table[np.arange(table.shape[1]) < used[:, None]], cache.shape[0])


def _check_rows(starts: Array, lengths: Array, most: int, queries: int) -> None:
    """Requests' rows ascend and exist, and none has more queries than tokens, padding apart."""
    counts = starts[1:] - starts[:-1]
    if counts.max() > most or counts.min() < 0:
        raise ValueError(
            f"query_start is {starts.tolist()}, but max_query_len is {most}; "
            "give ascending rows and an upper bound of their differences"
        )
    if starts[0] < 0 or starts[-1] > queries:
        raise ValueError(
            f"query_start is {starts.tolist()}, but there are {queries} queries; "
            "give rows that exist"
        )
    wrong = (counts > lengths) & (lengths > 0)
    if wrong.any():
        raise ValueError(
            f"a request has {counts[wrong][0]} queries, but {lengths[wrong][0]} "
            "tokens; its tokens include those of its queries"
        )


def check_softmax(softmax: Softmax) -> None:
    """Scale, window and softcap mean something.

    Raises:
        ValueError: they do not.
    """
    if not math.isfinite(softmax.scale):
        raise ValueError(f"scale is {softmax.scale}; it must be finite, usually head_size ** -0.5")
    if softmax.window < 0:
        raise ValueError(f"window is {softmax.window}; use a number of tokens, or 0 for no window")
    if not (math.isfinite(softmax.softcap) and softmax.softcap >= 0):
        raise ValueError(f"softcap is {softmax.softcap}; use a positive number, or 0 for none")


def check_write(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slots: Tensor,
    layout: CacheLayout,
    treatment: KeyTreatment,
) -> None:
    """The arguments of `write` fit together.

    Raises:
        ValueError: they do not.
    """
    layout.check(cache)
    _check_keys_and_values(key, value, cache, layout)
    check_treatment(treatment, cache.shape[1], layout.head_size)
    if slots.dtype != torch.int64 or slots.dim() != 1 or slots.shape[0] > key.shape[0]:
        raise ValueError(
            f"slots are {slots.dtype} {tuple(slots.shape)}; {key.shape[0]} tokens need "
            f"torch.int64 (n,) with n at most {key.shape[0]}"
        )


def check_slots(cache: Tensor, slots: Tensor, layout: CacheLayout) -> None:
    """Slots lie in the cache. Reads values: for the CPU only.

    Raises:
        ValueError: they do not.
    """
    capacity = cache.shape[0] * layout.block_size
    if slots.shape[0] and int(slots.max()) >= capacity:
        raise ValueError(
            f"a slot is {int(slots.max())}, but the cache has {cache.shape[0]} blocks of "
            f"{layout.block_size} tokens; use slots below {capacity}, negative ones for padding"
        )


def check_attention(
    query: Tensor,
    cache: Tensor,
    out: Tensor,
    batch: Batch,
    layout: CacheLayout,
    treatment: KeyTreatment,
    softmax: Softmax,
    sinks: Tensor | None,
) -> None:
    """The arguments of `attend` fit together.

    Raises:
        ValueError: they do not.
    """
    layout.check(cache)
    _check_heads("query", query, layout)
    _check_heads("out", out, layout)
    if out.shape != query.shape or out.dtype != query.dtype:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}; the query is {query.dtype} "
            f"{tuple(query.shape)}, and both must agree"
        )
    if query.shape[1] % cache.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads do not divide among {cache.shape[1]} KV heads; "
            "use a multiple of them"
        )
    check_treatment(treatment, cache.shape[1], layout.head_size)
    check_batch(batch)
    check_softmax(softmax)
    if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != query.shape[1:2]):
        raise ValueError(
            f"sinks are {sinks.dtype} {tuple(sinks.shape)}; {query.shape[1]} query heads need "
            f"torch.float32 ({query.shape[1]},)"
        )


def check_step(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, layout: CacheLayout
) -> None:
    """This step's keys and values fit its queries.

    Raises:
        ValueError: they do not.
    """
    _check_keys_and_values(key, value, cache, layout)
    if key.shape[0] < query.shape[0] or key.dtype != query.dtype:
        raise ValueError(
            f"the key is {key.dtype} {tuple(key.shape)}; the query is {query.dtype} "
            f"{tuple(query.shape)}: use one dtype, and a key for each query"
        )


def check_gather(
    cache: Tensor,
    blocks: Tensor,
    start: int,
    stop: int,
    keys: Tensor,
    values: Tensor,
    layout: CacheLayout,
) -> None:
    """The arguments of `gather` fit together.

    Raises:
        ValueError: they do not.
    """
    layout.check(cache)
    if blocks.dtype != torch.int32 or blocks.dim() != 1:
        raise ValueError(
            f"blocks are {blocks.dtype} {tuple(blocks.shape)}; use a row of the block table, "
            "torch.int32 (n,)"
        )
    capacity = blocks.shape[0] * layout.block_size
    if not 0 <= start <= stop <= capacity:
        raise ValueError(
            f"positions {start} to {stop} are asked for, but the blocks hold {capacity}; use "
            f"0 <= start <= stop <= {capacity}"
        )
    for name, rows in (("keys", keys), ("values", values)):
        check_activations(rows.dtype)
        expected = (cache.shape[1], layout.padded_size)
        if rows.dim() != 3 or rows.shape[1:] != expected or rows.shape[0] < stop - start:
            raise ValueError(
                f"{name} have shape {tuple(rows.shape)}; {stop - start} positions need at least "
                f"({stop - start}, {expected[0]}, {expected[1]})"
            )


def check_blocks(cache: Tensor, blocks: Tensor, stop: int, layout: CacheLayout) -> None:
    """Blocks that positions before `stop` lie in exist. Reads values: for the CPU only.

    Raises:
        ValueError: they do not.
    """
    _check_exist(blocks[: -(-stop // layout.block_size)].numpy(), cache.shape[0])


def _check_exist(used: Array, blocks: int) -> None:
    if used.size and (used.min() < 0 or used.max() >= blocks):
        wrong = used[(used < 0) | (used >= blocks)][0]
        raise ValueError(
            f"the block table names block {wrong}, but the cache has {blocks} blocks; "
            f"use 0 to {blocks - 1}"
        )


def _check_keys_and_values(key: Tensor, value: Tensor, cache: Tensor, layout: CacheLayout) -> None:
    _check_heads("key", key, layout)
    _check_heads("value", value, layout)
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(
            f"the value is {value.dtype} {tuple(value.shape)}; the key is {key.dtype} "
            f"{tuple(key.shape)}, and both must agree"
        )
    if key.shape[1] != cache.shape[1]:
        raise ValueError(
            f"the key has {key.shape[1]} heads, but the cache has {cache.shape[1]}; "
            "both have one for each KV head"
        )


def _check_heads(name: str, given: Tensor, layout: CacheLayout) -> None:
    """Float [tokens, heads, head_size], a head in one piece."""
    check_activations(given.dtype)
    if given.dim() != 3 or given.shape[2] != layout.head_size:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}; this cache takes "
            f"(tokens, heads, {layout.head_size})"
        )
    if given.stride(2) != 1 and given.shape[2] > 1:
        raise ValueError(
            f"{name} has strides {given.stride()}; the dimensions of a head must be contiguous: "
            "copy it"
        )
