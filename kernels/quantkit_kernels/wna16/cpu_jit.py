"""Compiles the CPU kernel for this machine and runs it on PyTorch's own OpenMP threads.

PyTorch's threads, not a pool of our own: a server binds them to cores, and threads started later
would inherit the one core of the thread that started them.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import torch

from quantkit_kernels.wna16.cpu_inner import Arithmetic
from quantkit_kernels.wna16.cpu_kernel import FIELDS, build_module


@dataclass(frozen=True)
class Target:
    """What the kernel is compiled for.

    Attributes:
        arithmetic: what code is generated.
        cpu: LLVM's name of the processor.
        features: LLVM's feature string.
    """

    arithmetic: Arithmetic
    cpu: str
    features: str


def host_target(bits: int) -> Target:
    """The target for the CPU this process runs on, and codes of 4 or 8 bits.

    With AVX-512, 12 rows of two vectors fill 24 of 32 registers. With AVX2 or NEON a vector takes
    two or four registers: 2 rows fill 8 of 16 or 16 of 32, and weights take most of the rest.
    """
    features = llvm.get_host_cpu_features()
    bf16 = features.get("avx512bf16", False) and features.get("avx512bw", False)
    arithmetic = Arithmetic(
        bits=bits,
        unit="bf16" if bf16 else "fma",
        max_rows=12 if features.get("avx512f", False) else 2,
    )
    return Target(arithmetic, llvm.get_host_cpu_name(), features.flatten())


class ArgumentBlock(ctypes.Structure):
    """The fields of `cpu_kernel.FIELDS`; the counters start at 0."""

    _fields_ = tuple((name, ctypes.c_int64) for name in FIELDS)


class Kernel:
    """A compiled kernel; calls may come from several threads at once."""

    def __init__(self, target: Target) -> None:
        self.arithmetic = target.arithmetic
        # The engine owns the machine code that the address points to.
        self._engine = _compile(target)
        self._address = self._engine.get_function_address("worker")
        self._serial = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)
        self._parallel = _openmp_parallel()

    def run(self, block: ArgumentBlock, threads: int) -> None:
        """Compute all tasks; the block's counters advance, so each call needs its own."""
        if threads == 1 or self._parallel is None:
            self._serial(ctypes.addressof(block))
        else:
            self._parallel(self._address, ctypes.addressof(block), threads, 0)


_lock = threading.Lock()
_kernels: dict[int, Kernel] = {}


def host_kernel(bits: int) -> Kernel:
    """The kernel for this machine, compiled at the first call: about half a second."""
    if bits not in _kernels:
        with _lock:
            if bits not in _kernels:
                _kernels[bits] = Kernel(host_target(bits))
    return _kernels[bits]


def assembly(target: Target, triple: str) -> str:
    """The machine code as text, for any processor LLVM was built for."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = _machine(target, triple)
    return str(machine.emit_assembly(_module(target, machine)))


def _compile(target: Target) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = _machine(target, llvm.get_process_triple())
    return llvm.create_mcjit_compiler(_module(target, machine), machine)


def _machine(target: Target, triple: str) -> Any:
    chosen = llvm.Target.from_triple(triple)
    return chosen.create_target_machine(cpu=target.cpu, features=target.features, opt=3)


def _module(target: Target, machine: Any) -> Any:
    """Verified IR. No optimiser is run: what it would do, the emitter has done."""
    module = llvm.parse_assembly(str(build_module(target.arithmetic)))
    module.triple = machine.triple
    module.verify()
    return module


def _openmp_parallel() -> Any:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP PyTorch loaded, or None.

    GNU's, LLVM's and Intel's OpenMP all export it; each runs function(data) on `threads` threads.
    """
    if not torch.backends.openmp.is_available():
        return None
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if parallel is not None:
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
    return parallel
