"""CPUs to generate kernels for: the one at hand, parts of it, and others whose code is read."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from quantkit_kernels.cpu.host import Kernel, Product, arithmetic_for, host_features
from quantkit_kernels.cpu.native import Processor, assembly, host_processor
from quantkit_kernels.cpu.worker import build_module

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"


class Cpu(NamedTuple):
    """A processor by LLVM's name, and those of its features that choose the arithmetic."""

    name: str
    features: frozenset[str]


_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vnni"})

COOPERLAKE = Cpu("cooperlake", _AVX512 | {"avx512bf16"})
SAPPHIRE_RAPIDS = Cpu("sapphirerapids", _AVX512 | {"avx512bf16", "avx512vbmi"})
HASWELL = Cpu("haswell", frozenset())
NEOVERSE = Cpu("neoverse-n1", frozenset())

UNITS = {
    "bf16": frozenset({"avx512f", "avx512bw", "avx512bf16"}),
    "fma12": frozenset({"avx512f"}),
    "fma2": frozenset(),
}
"""Parts of this machine's features, by the arithmetic that they leave; `host` means all of them."""


def assembly_for(product: Product, cpu: Cpu, triple: str = X86) -> str:
    """Machine code, as text, for a CPU that need not be present."""
    module = build_module(arithmetic_for(product, set(cpu.features)))
    return assembly(module, Processor(cpu.name, ""), triple)


@functools.cache
def kernel(product: Product, unit: str) -> Kernel:
    """A kernel for the CPU the tests run on, using all or a part of its features."""
    features = host_features() if unit == "host" else host_features() & UNITS[unit]
    return Kernel(arithmetic_for(product, features), host_processor())


def loop_of(function: str, text: str) -> str:
    """The longest loop of a function in assembly: from a label to the jump back to it."""
    body = text.split(f"\n{function}:", 1)[1].split(".Lfunc_end", 1)[0]
    loops = re.findall(r"(?s)\n(\.LBB\w+):(.*?)\bj\w+\s+\1\b", body)
    return max((inner for _, inner in loops), key=len)
