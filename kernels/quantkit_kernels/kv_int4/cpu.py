"""CPU: kernels generated for a cache's format, a dtype and a group of heads, on PyTorch's threads.

Decoding reads codes once, whatever the number of query heads. A request's results have the same
bits with any number of threads, and in any batch of the same `max_query_len`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import cpu_gather, cpu_write, generic
from quantkit_kernels.kv_int4.cpu_gather import GatherVariant
from quantkit_kernels.kv_int4.cpu_plan import AttendBlock, limited, plan
from quantkit_kernels.kv_int4.cpu_rotate import tables
from quantkit_kernels.kv_int4.cpu_workers import FLOATS, host_worker
from quantkit_kernels.kv_int4.cpu_write import WriteVariant
from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.treatment import Batch, KeyTreatment, Softmax

TASK_TOKENS = 16
"""Tokens that a thread writes or gathers at once."""

THREAD_HEADS = 64
"""Heads of tokens, written or gathered, that are worth a second thread: about 20 us of one."""

prefill = generic.prefill


class WriteBlock(ctypes.Structure):
    """The fields of `cpu_write.FIELDS`; the counter starts at 0."""

    _fields_ = tuple((name, ctypes.c_int64) for name in cpu_write.FIELDS)


class GatherBlock(ctypes.Structure):
    """The fields of `cpu_gather.FIELDS`; the counter starts at 0."""

    _fields_ = tuple((name, ctypes.c_int64) for name in cpu_gather.FIELDS)


def write(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slots: Tensor,
    layout: CacheLayout,
    treatment: KeyTreatment,
) -> None:
    """As `op.write`."""
    _check_rows(layout)
    tokens, heads = len(slots), cache.shape[1]
    if not tokens:
        return
    slots, shift, scale = slots.contiguous(), _dense(treatment.shift), _dense(treatment.scale)
    variant = WriteVariant(layout, FLOATS[key.dtype], shift is not None, scale is not None)
    size, pieces = key.element_size(), -(-tokens // TASK_TOKENS)
    block = WriteBlock(
        tasks=pieces, task_tokens=TASK_TOKENS, tokens=tokens, heads=heads,
        slots=slots.data_ptr(),
        key=key.data_ptr(), key_row=key.stride(0) * size, key_head=key.stride(1) * size,
        value=value.data_ptr(), value_row=value.stride(0) * size,
        value_head=value.stride(1) * size,
        cache=cache.data_ptr(), cache_block=cache.stride(0), cache_head=cache.stride(1),
        shift=_address(shift), scale=_address(scale),
        table=tables(layout.head_size).forward.data_ptr(),
    )  # fmt: skip
    host_worker(variant).run(block, _threads(pieces, tokens * heads // THREAD_HEADS))


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
    _check_rows(layout)
    tokens, heads = stop - start, cache.shape[1]
    if tokens <= 0:
        return
    blocks = blocks.contiguous()
    if keys.stride(2) != 1 or values.stride(2) != 1:
        generic.gather(cache, blocks, start, stop, keys, values, layout)
        return
    variant = GatherVariant(layout, FLOATS[keys.dtype], FLOATS[values.dtype])
    key_size, value_size = keys.element_size(), values.element_size()
    pieces = -(-tokens // TASK_TOKENS)
    block = GatherBlock(
        tasks=pieces, task_tokens=TASK_TOKENS, tokens=tokens, heads=heads, start=start,
        blocks=blocks.data_ptr(),
        cache=cache.data_ptr(), cache_block=cache.stride(0), cache_head=cache.stride(1),
        keys=keys.data_ptr(), keys_row=keys.stride(0) * key_size,
        keys_head=keys.stride(1) * key_size,
        values=values.data_ptr(), values_row=values.stride(0) * value_size,
        values_head=values.stride(1) * value_size,
    )  # fmt: skip
    host_worker(variant).run(block, _threads(pieces * heads, tokens * heads // THREAD_HEADS))


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
    _check_rows(layout)
    requests = len(batch.seq_lens)
    if not requests or not batch.max_seq_len or not batch.max_query_len:
        return
    shift, scale, sinks = _dense(treatment.shift), _dense(treatment.scale), _dense(sinks)
    chosen = plan(
        layout, query.dtype, requests, query.shape[1], cache.shape[1], batch.max_query_len,
        batch.max_seq_len, softmax, shift is not None, scale is not None, sinks is not None,
        torch.get_num_threads(),
    )  # fmt: skip
    finished = torch.zeros(chosen.pairs, dtype=torch.int64)
    memory = torch.empty(chosen.queries_bytes + chosen.partials_bytes, dtype=torch.uint8)
    block = AttendBlock.from_buffer_copy(chosen.block)
    size = query.element_size()
    block.query = query.data_ptr()
    block.query_row, block.query_head = query.stride(0) * size, query.stride(1) * size
    block.out = out.data_ptr()
    block.out_row, block.out_head = out.stride(0) * size, out.stride(1) * size
    block.cache, block.cache_block = cache.data_ptr(), cache.stride(0)
    block.cache_head = cache.stride(1)
    block.block_table = batch.block_table.data_ptr()
    block.block_table_row = 4 * batch.block_table.stride(0)
    block.seq_lens, block.query_start = batch.seq_lens.data_ptr(), batch.query_start.data_ptr()
    block.shift, block.scale, block.sinks = _address(shift), _address(scale), _address(sinks)
    block.finished = finished.data_ptr()
    block.queries = memory.data_ptr()
    block.partials = block.queries + chosen.queries_bytes
    chosen.worker.run(block, chosen.threads)


def _check_rows(layout: CacheLayout) -> None:
    if layout.value_columns:
        raise ValueError(
            "value_columns is True; on a CPU the values of a cache are rows: use "
            "value_columns=False"
        )


def _threads(tasks: int, worth: int) -> int:
    return limited(torch.get_num_threads(), tasks, worth)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
