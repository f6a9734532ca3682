"""How a call of attention is cut: the kernel, tasks, threads and scratch memory."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import NamedTuple

import torch

from quantkit_kernels.cpu.host import host_features
from quantkit_kernels.cpu.native import Worker
from quantkit_kernels.kv_int4 import cpu_request
from quantkit_kernels.kv_int4.cpu_rotate import tables
from quantkit_kernels.kv_int4.cpu_variant import SPLIT_TOKENS, AttendVariant
from quantkit_kernels.kv_int4.cpu_workers import FLOATS, host_worker
from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.treatment import Softmax

MAX_ROWS = 8
"""Rows of queries that registers of AVX-512 serve at a time."""

FEW_REGISTERS_ROWS = 2
"""Those that AVX2's or NEON's serve, whose registers hold 8 or 4 lanes."""

THREAD_TOKENS = 256
"""Tokens times KV heads, attended to, that are worth a second thread: about 10 us of one."""


class AttendBlock(ctypes.Structure):
    """The fields of `cpu_request.FIELDS`; the counters start at 0."""

    _fields_ = tuple((name, ctypes.c_int64) for name in cpu_request.FIELDS)


class Plan(NamedTuple):
    """Arguments without addresses of a call's tensors, the kernel, its threads and its scratch.

    pairs: of a request and a KV head.
    """

    block: AttendBlock
    worker: Worker
    threads: int
    pairs: int
    queries_bytes: int
    partials_bytes: int


@lru_cache(maxsize=4096)
def plan(
    layout: CacheLayout,
    dtype: torch.dtype,
    requests: int,
    heads: int,
    kv_heads: int,
    max_query_len: int,
    max_seq_len: int,
    softmax: Softmax,
    shift: bool,
    scale: bool,
    sinks: bool,
    max_threads: int,
) -> Plan:
    """Count tasks and the threads they are worth, and have the kernel ready."""
    group = heads // kv_heads
    variant = attend_variant(layout, dtype, group, max_query_len, softmax, shift, scale, sinks)
    splits = -(-max_seq_len // SPLIT_TOKENS)
    rows = -(-max_query_len * group // variant.rows) * variant.rows
    pairs = requests * kv_heads
    rotation = tables(layout.head_size)
    log2e = math.log2(math.e)
    capped = softmax.softcap > 0
    block = AttendBlock(
        requests=requests,
        heads=kv_heads,
        splits=splits,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        window=softmax.window,
        factor=_bits(softmax.scale / softmax.softcap if capped else softmax.scale * log2e),
        softcap=_bits(softmax.softcap * log2e),
        rows=rows,
        table=rotation.forward.data_ptr(),
        back_table=rotation.backward.data_ptr(),
    )
    threads = limited(max_threads, pairs * splits, pairs * max_seq_len // THREAD_TOKENS)
    return Plan(
        block,
        host_worker(variant),
        threads,
        pairs,
        threads * rows * variant.row_bytes,
        pairs * splits * rows * variant.partial_bytes,
    )


def attend_variant(
    layout: CacheLayout,
    dtype: torch.dtype,
    group: int,
    max_query_len: int,
    softmax: Softmax,
    shift: bool,
    scale: bool,
    sinks: bool,
) -> AttendVariant:
    """The kernel for queries of a dtype, `group` of them a KV head.

    16-bit queries are multiplied as 16-bit integers where the CPU has instructions for it.
    """
    features = host_features()
    most = MAX_ROWS if "avx512f" in features else FEW_REGISTERS_ROWS
    rows = group * max_query_len
    return AttendVariant(
        layout=layout,
        kind=FLOATS[dtype],
        group=group,
        rows=-(-rows // -(-rows // most)),
        integers={"avx512vnni", "avx512bw"} <= features and dtype != torch.float32,
        scale=scale,
        # Softmax does not see a number that all logits share, but for these two.
        shift=shift and (sinks or softmax.softcap > 0),
        softcap=softmax.softcap > 0,
        sinks=sinks,
    )


def limited(most: int, tasks: int, worth: int) -> int:
    """Threads for so many tasks, worth so many."""
    return max(1, min(most, tasks, worth))


def _bits(value: float) -> int:
    """The bits of a float32."""
    return ctypes.c_int32.from_buffer(ctypes.c_float(value)).value
