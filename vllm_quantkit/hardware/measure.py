"""Short measurements of this machine: what it reads a second, and what it multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_quantkit.hardware.catalogue import known_device
from vllm_quantkit.hardware.device import Device, Number
from vllm_quantkit.hardware.machine import this_cpu, this_gpu

READ_BYTES = {"cpu": 1 << 29, "cuda": 1 << 30}
"""Beyond every cache: 512 MiB on a CPU, on a GPU 1 GiB."""

SHARE_OF_MEMORY = 8
"""At most one part of so many is read, so that a small machine is not pushed into swapping."""

SIZE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices that are multiplied."""

ROUNDS = 7

BUDGET_SECONDS = 0.4
"""For each measurement, so that a slow machine does not wait long."""


class Measured(NamedTuple):
    """What was measured; numbers that the device does not multiply are missing."""

    bandwidth: float
    peaks: dict[Number, float]


def measure(device: Device) -> Device:
    """The device with bandwidth and peaks measured, in about two seconds.

    A device that is not in this machine comes back as it is.
    """
    if not _is_here(device):
        return device
    where = torch.device("cuda" if device.kind == "cuda" else "cpu")
    found = measure_torch(where, device.memory_bytes)
    names = ("bandwidth", *found.peaks)
    return device.model_copy(
        update={
            "bandwidth": found.bandwidth,
            "peaks": {**device.peaks, **found.peaks},
            "measured": names,
        }
    )


def measure_torch(where: torch.device, memory_bytes: int) -> Measured:
    """Bandwidth of reading, and rates of products, with the threads that torch has."""
    size = min(READ_BYTES[where.type], memory_bytes // SHARE_OF_MEMORY)
    peaks: dict[Number, float] = {"bf16": _rate(where, torch.bfloat16)}
    peaks["int8"] = _rate(where, torch.int8)
    if where.type == "cuda" and torch.cuda.get_device_capability(where) >= (8, 9):
        peaks["fp8"] = _rate(where, torch.float8_e4m3fn)
    return Measured(_bandwidth(where, size), peaks)


def _is_here(device: Device) -> bool:
    here = this_gpu() if device.kind == "cuda" else this_cpu()
    if here is None:
        return False
    return device.name == here.name or known_device(here.name) == device


def _bandwidth(where: torch.device, size: int) -> float:
    """Bytes a second of a sum over memory."""
    values = torch.ones(size // 4, dtype=torch.float32, device=where)
    return values.nbytes / _seconds(values.sum, where)


def _rate(where: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a square product."""
    size = SIZE[where.type]
    ones = torch.ones(size, size, device=where).to(dtype)
    return 2 * size**3 / _seconds(lambda: _product(ones), where)


def _product(ones: Tensor) -> Tensor:
    if ones.dtype == torch.int8:
        return torch._int_mm(ones, ones)
    if ones.dtype == torch.float8_e4m3fn:
        scale = torch.ones((), device=ones.device)
        return torch._scaled_mm(
            ones, ones.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
        )
    return ones @ ones


def _seconds(run: Callable[[], Tensor], where: torch.device) -> float:
    """Median of several runs, the first left out."""
    _timed(run, where)
    taken: list[float] = []
    while len(taken) < ROUNDS and sum(taken) < BUDGET_SECONDS:
        taken.append(_timed(run, where))
    return median(taken)


def _timed(run: Callable[[], Tensor], where: torch.device) -> float:
    start = time.perf_counter()
    run()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - start
