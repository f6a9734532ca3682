"""Which kernel the CPU at hand runs for a product, compiled when it is first needed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Set
from functools import cache
from typing import NamedTuple

import llvmlite.binding as llvm

from quantkit_kernels.act_quant.rows import RowCode
from quantkit_kernels.code_types import CodeType
from quantkit_kernels.cpu.arithmetic import Arithmetic, Unit
from quantkit_kernels.cpu.native import Processor, Worker, host_processor
from quantkit_kernels.cpu.worker import FIELDS, build_module


class Product(NamedTuple):
    """What is multiplied, whatever the CPU.

    Attributes:
        bits: width of a weight's code, 4 or 8.
        code_type: what it stands for.
        row_code: codes of 8-bit rows; None for rows of floating-point numbers.
        weight_pieces: most bfloat16 numbers that may stand for a weight.
    """

    bits: int
    code_type: CodeType = "int"
    row_code: RowCode | None = None
    weight_pieces: int = 1


def arithmetic_for(product: Product, features: Set[str]) -> Arithmetic:
    """What to generate for a CPU with these features, by LLVM's names.

    With AVX-512, 12 rows of two vectors fill 24 of 32 registers. With AVX2 or NEON a vector takes
    two or four registers: 2 rows fill 8 of 16 or 16 of 32, and weights take most of the rest.
    """
    unit = _unit(product, features)
    return Arithmetic(
        bits=product.bits,
        unit=unit,
        max_rows=12 if "avx512f" in features else 2,
        code_type=product.code_type,
        row_code=product.row_code,
        weight_pieces=product.weight_pieces if unit == "bf16" else 1,
        avx512="avx512f" in features,
        byte_tables="avx512vbmi" in features,
    )


def _unit(product: Product, features: Set[str]) -> Unit:
    if product.row_code == "int8" and {"avx512vnni", "avx512bw"} <= features:
        return "vnni"
    return "bf16" if {"avx512bf16", "avx512bw"} <= features else "fma"


@cache
def host_features() -> frozenset[str]:
    """LLVM's names of what the CPU this process runs on can do."""
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


class ArgumentBlock(ctypes.Structure):
    """The fields of `cpu.worker.FIELDS`; the counters start at 0."""

    _fields_ = tuple((name, ctypes.c_int64) for name in FIELDS)


class Kernel:
    """A compiled kernel; calls may come from several threads at once.

    Attributes:
        arithmetic: what it was generated for.
    """

    def __init__(self, arithmetic: Arithmetic, processor: Processor) -> None:
        self.arithmetic = arithmetic
        entries = ("worker",) if arithmetic.row_code is None else ("stager", "worker")
        self._worker = Worker(build_module(arithmetic), processor, entries)

    def run(self, block: ArgumentBlock, threads: int) -> None:
        """Stage 8-bit rows, then compute all tasks; each call needs its own block."""
        self._worker.run(block, threads)


_lock = threading.Lock()
_kernels: dict[Product, Kernel] = {}


def host_kernel(product: Product) -> Kernel:
    """The kernel for this machine, compiled at the first call: about half a second."""
    if product not in _kernels:
        with _lock:
            if product not in _kernels:
                arithmetic = arithmetic_for(product, host_features())
                _kernels[product] = Kernel(arithmetic, host_processor())
    return _kernels[product]
