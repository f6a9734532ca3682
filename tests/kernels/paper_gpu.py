"""A GPU on paper: launches specialise and compile as they would there, and then do nothing.

What a launch is compiled for depends on its tensors' types, alignments and sizes, all of which the
host knows. So without a GPU one can tell which kernels a call needs, that they compile for it, and
whether a later call needs another one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from quantkit_kernels import devices, triton_common
from quantkit_kernels.tuning import Device


@dataclass
class Launches:
    """What has been asked of the GPU.

    Attributes:
        launched: kernels' names, in order.
        compiled: those of them that a launch had to wait for.
    """

    launched: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)


class _Driver:
    """Triton's driver, for a GPU that takes every binary and runs none."""

    def __init__(self, device: Device, launches: Launches) -> None:
        self._device = device
        self._launches = launches
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._device.capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._device.shared_bytes,
            "multiprocessor_count": self._device.multiprocessors,
        }

    def load_binary(self, *binary: Any) -> tuple[None, int, int, int, int]:
        """Module (none, so nobody unloads it), function, registers, spills, threads."""
        return None, 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments, **options: self._launches.launched.append(metadata.name)


@contextmanager
def triton_for_cpu() -> Iterator[None]:
    """Ops on CPU tensors go to the modules that launch Triton kernels."""
    with patch.dict(devices.MODULES, cpu=devices.MODULES["cuda"]):
        devices.backend.cache_clear()
        try:
            yield
        finally:
            devices.backend.cache_clear()


@contextmanager
def paper_gpu(device: Device) -> Iterator[Launches]:
    """Ops on CPU tensors launch on `device`, as if the tensors were there.

    Kernels compiled before count as not compiled yet. Nothing is written to their outputs.
    """
    launches = Launches()
    compile_ = JITFunction._do_compile

    def compiling(function: Any, *arguments: Any, **options: Any) -> Any:
        launches.compiled.append(function.fn.__name__)
        return compile_(function, *arguments, **options)

    known = list(_functions())
    caches = [function.device_caches for function in known]
    for function in known:
        function.device_caches = type(function.device_caches)(function.create_binder)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(device, launches))
    try:
        with (
            patch.object(JITFunction, "_do_compile", compiling),
            patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)),
            triton_for_cpu(),
            patch.object(triton_common, "_cuda_device", lambda index: device),
        ):
            yield launches
    finally:
        triton.runtime.driver.set_active(before)
        for function, cache in zip(known, caches, strict=True):
            function.device_caches = cache


def _functions() -> set[JITFunction]:
    """Those of all modules imported so far; what is imported later starts without kernels."""
    modules = [
        module for name, module in sys.modules.items() if name.startswith("quantkit_kernels")
    ]
    values = (value for module in modules for value in vars(module).values())
    return {value for value in values if isinstance(value, JITFunction)}
