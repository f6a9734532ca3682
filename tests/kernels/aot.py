"""Compile Triton kernels for GPUs that need not be present, and read what became of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantkit_kernels.tuning import Device
from tests.kernels.sass import instructions, longest_loop, opcode

DEVICES = (
    Device(80, multiprocessors=108, shared_bytes=163 * 1024, name="NVIDIA A100-SXM4-80GB"),
    Device(89, multiprocessors=142, shared_bytes=99 * 1024, name="NVIDIA L40S"),
    Device(90, multiprocessors=132, shared_bytes=227 * 1024, name="NVIDIA H200"),
    Device(100, multiprocessors=148, shared_bytes=227 * 1024, name="NVIDIA B200"),
)
"""An A100, an L40S, an H200 and a B200."""

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_USAGE = re.compile(r"REG:(?P<registers>\d+)\s+STACK:(?P<stack>\d+).*?LOCAL:(?P<local>\d+)")


@dataclass(frozen=True)
class Compiled:
    """A kernel in machine code.

    Attributes:
        sass: the disassembly.
        ptx: the assembly before it.
        registers: per thread.
        stack: bytes per thread; anything but 0 is a spill.
        local: bytes of local memory per thread.
        shared: bytes of shared memory per program.
    """

    sass: str
    ptx: str
    registers: int
    stack: int
    local: int
    shared: int

    @property
    def opcodes(self) -> Counter[str]:
        """How often each instruction stands in the kernel, without modifiers: LDGSTS, HGMMA."""
        return Counter(opcode(text) for text in instructions(self.sass))

    @property
    def main_loop(self) -> Counter[str]:
        """The same in the longest loop."""
        return Counter(opcode(text) for text in longest_loop(self.sass))


def compile_kernel(
    kernel: object,
    types: dict[str, str],
    constants: dict[str, object],
    aligned: tuple[str, ...],
    arch: int,
    warps: int,
) -> Compiled:
    """Compile for compute capability arch / 10.

    Args:
        kernel: a `triton.jit` function.
        types: argument to "*bf16", "*i32", "i32" and so on.
        constants: constexpr argument to value.
        aligned: arguments that are divisible by 16.
        arch: 80, 90 and so on.
        warps: per program.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _USAGE.search(_tool("cuobjdump", "-res-usage", built.asm["cubin"]))
    return Compiled(
        sass=_tool("nvdisasm", "-c", built.asm["cubin"]),
        ptx=built.asm["ptx"],
        registers=int(usage["registers"]),
        stack=int(usage["stack"]),
        local=int(usage["local"]),
        shared=built.metadata.shared,
    )


def _tool(name: str, flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), flag, file.name]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout
