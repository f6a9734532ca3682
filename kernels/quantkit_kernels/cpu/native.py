"""Compiles worker functions for a processor and runs them on PyTorch's own OpenMP threads.

PyTorch's threads, not a pool of our own: a server binds them to cores, and threads started later
would inherit the one core of the thread that started them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir


@dataclass(frozen=True)
class Processor:
    """What code is compiled for.

    Attributes:
        cpu: LLVM's name of it.
        features: LLVM's feature string.
    """

    cpu: str
    features: str


def host_processor() -> Processor:
    """The one this process runs on."""
    return Processor(llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())


class Worker:
    """The compiled functions `entry(arguments)` of a module, each of which draws its tasks.

    Calls may come from several threads at once.
    """

    def __init__(
        self, module: ir.Module, processor: Processor, entries: Sequence[str] = ("worker",)
    ) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = _machine(processor, llvm.get_process_triple())
        # The engine owns the machine code that the addresses point to.
        self._engine = llvm.create_mcjit_compiler(_parsed(module, machine), machine)
        self._addresses = [self._engine.get_function_address(entry) for entry in entries]
        self._serial = [ctypes.CFUNCTYPE(None, ctypes.c_void_p)(a) for a in self._addresses]
        self._parallel = _openmp_parallel()

    def run(self, arguments: ctypes.Structure, threads: int) -> None:
        """Compute all tasks, those of one entry after those of the one before.

        Counters in the arguments advance, so each call needs its own.
        """
        block = ctypes.addressof(arguments)
        if threads == 1 or self._parallel is None:
            for function in self._serial:
                function(block)
        else:
            for address in self._addresses:
                self._parallel(address, block, threads, 0)


def assembly(module: ir.Module, processor: Processor, triple: str) -> str:
    """The machine code as text, for any processor LLVM was built for."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = _machine(processor, triple)
    return str(machine.emit_assembly(_parsed(module, machine)))


def _machine(processor: Processor, triple: str) -> Any:
    target = llvm.Target.from_triple(triple)
    return target.create_target_machine(cpu=processor.cpu, features=processor.features, opt=3)


def _parsed(module: ir.Module, machine: Any) -> Any:
    """Verified IR. No optimiser is run: what it would do, the emitter has done."""
    parsed = llvm.parse_assembly(str(module))
    parsed.triple = machine.triple
    parsed.verify()
    return parsed


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
