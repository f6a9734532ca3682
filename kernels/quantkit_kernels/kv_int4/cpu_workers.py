"""The compiled kernels of a process, one for each variant."""

from __future__ import annotations

import threading

import torch
from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import Float
from quantkit_kernels.cpu.native import Worker, host_processor
from quantkit_kernels.kv_int4 import cpu_attend, cpu_gather, cpu_write
from quantkit_kernels.kv_int4.cpu_gather import GatherVariant
from quantkit_kernels.kv_int4.cpu_variant import AttendVariant
from quantkit_kernels.kv_int4.cpu_write import WriteVariant

FLOATS: dict[torch.dtype, Float] = {
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
}

Variant = AttendVariant | WriteVariant | GatherVariant

_lock = threading.Lock()
_workers: dict[Variant, Worker] = {}


def host_worker(variant: Variant) -> Worker:
    """The kernel for this machine, compiled at the first call: a tenth of a second to a second."""
    if variant not in _workers:
        with _lock:
            if variant not in _workers:
                module, entries = _built(variant)
                _workers[variant] = Worker(module, host_processor(), entries)
    return _workers[variant]


def _built(variant: Variant) -> tuple[ir.Module, tuple[str, ...]]:
    """Its module and its entries."""
    if isinstance(variant, AttendVariant):
        return cpu_attend.build_module(variant), cpu_attend.ENTRIES
    if isinstance(variant, WriteVariant):
        return cpu_write.build_module(variant), ("write",)
    return cpu_gather.build_module(variant), ("gather",)
