"""CPU: a row's values in float32 in cache, its scales, its codes: one reading of memory.

Very long rows, and rows whose groups are no multiple of 16 channels, go the way of any device.
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.act_quant import generic
from quantkit_kernels.act_quant.cpu_kernel import FIELDS, build_module
from quantkit_kernels.act_quant.cpu_math import Float
from quantkit_kernels.act_quant.cpu_values import Variant
from quantkit_kernels.act_quant.rows import RowQuantizer
from quantkit_kernels.act_quant.source import Kind, Source, quantise_with
from quantkit_kernels.cpu.ir import LANES
from quantkit_kernels.cpu.native import Worker, host_processor

FLOATS: dict[torch.dtype, Float] = {
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
}

MAX_CHANNELS = 1 << 17
"""Most channels of a row: a thread keeps a row in float32 on its stack, half a MiB at most."""

THREAD_VALUES = 32768
"""Least values that are worth a second thread: about 10 us of one."""

TASK_VALUES = 16384
"""Values of the rows that a thread draws at once."""


def quantise(
    source: Source, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> Tensor:
    """Rows of a source."""
    whole_vectors = quantizer.group_size <= 0 or quantizer.group_size % LANES == 0
    if source.x.numel() == 0 or source.width > MAX_CHANNELS or not whole_vectors:
        return generic.quantise(source, quantizer, scale, zero)
    return quantise_with(_run, source, quantizer, scale, zero)


def _run(
    source: Source, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> Tensor:
    x, weight, residual = source.x, source.weight, source.residual
    plan = _plan(
        source.kind,
        x.dtype,
        torch.float32 if weight is None else weight.dtype,
        quantizer,
        x.shape[0],
        source.width,
        source.epsilon,
        torch.get_num_threads(),
    )
    out = torch.empty(x.shape[0], plan.stride, dtype=torch.uint8)
    block = ArgumentBlock.from_buffer_copy(plan.block)
    block.x, block.x_row = x.data_ptr(), x.stride(0) * x.element_size()
    block.out = out.data_ptr()
    if weight is not None:
        block.weight = weight.data_ptr()
    if residual is not None and source.total is not None:
        block.residual = residual.data_ptr()
        block.residual_row = residual.stride(0) * residual.element_size()
        block.total = source.total.data_ptr()
    if scale is not None:
        scale = scale.to(torch.float32)
        block.scale = scale.data_ptr()
    if zero is not None:
        zero = zero.to(torch.float32)
        block.zero = zero.data_ptr()
    plan.worker.run(block, plan.threads)
    return out


class ArgumentBlock(ctypes.Structure):
    """The fields of `cpu_kernel.FIELDS`; the counter starts at 0."""

    _fields_ = tuple((name, ctypes.c_int64) for name in FIELDS)


class _Plan(NamedTuple):
    """Arguments without addresses, the kernel and its threads, and bytes of a row of results."""

    block: ArgumentBlock
    worker: Worker
    threads: int
    stride: int


@lru_cache(maxsize=4096)
def _plan(
    kind: Kind,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    quantizer: RowQuantizer,
    rows: int,
    width: int,
    epsilon: float,
    max_threads: int,
) -> _Plan:
    """Cut rows into tasks, count the threads they are worth, and have the kernel ready."""
    layout, vectors = quantizer.layout(width), -(-width // LANES)
    threads = max(1, min(max_threads, rows, rows * width // THREAD_VALUES))
    task_rows = max(1, min(TASK_VALUES // width, rows // threads))
    dtypes = FLOATS[dtype], FLOATS[weight_dtype]
    block = ArgumentBlock(
        tasks=-(-rows // task_rows),
        task_rows=task_rows,
        rows=rows,
        width=width,
        total_row=width * dtype.itemsize,
        epsilon=_bits(epsilon),
        bound=_bits(quantizer.upper_bound),
        groups=layout.groups,
        group_vectors=quantizer.group_size // LANES if quantizer.group_size > 0 else vectors,
        out_row=layout.stride,
        scales_at=layout.scales_at,
        sums=layout.sums,
        sum_vectors=-(-quantizer.sum_group // LANES),
    )
    worker = host_worker(Variant(kind, *dtypes, quantizer.code, quantizer.symmetric))
    return _Plan(block, worker, threads, layout.stride)


_lock = threading.Lock()
_workers: dict[Variant, Worker] = {}


def host_worker(variant: Variant) -> Worker:
    """The kernel for this machine, compiled at the first call: about a tenth of a second."""
    if variant not in _workers:
        with _lock:
            if variant not in _workers:
                _workers[variant] = Worker(build_module(variant), host_processor())
    return _workers[variant]


def _bits(value: float) -> int:
    """The bits of a float32, infinity where it is too large for one."""
    return ctypes.c_int32.from_buffer(ctypes.c_float(value)).value
