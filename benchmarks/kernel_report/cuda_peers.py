"""vLLM's fused norms that quantise, which are CUDA: read from a released library, not compiled.

pip download --no-deps vllm==0.26.0 && unzip vllm-*.whl 'vllm/_C*.so'
python -m benchmarks.kernel_report --only cuda --cuda-library vllm/_C_stable_libtorch.abi3.so
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.kernel_report.linear_peers import HOPPER
from tests.kernels.aot import TOOLS, Compiled
from tests.kernels.gates import Gate
from tests.kernels.sass import loops, opcode, width

ARCH = f"sm_{HOPPER.capability}"
NORM = "rms_norm_dynamic_per_token_quant_kernelIN3c108BFloat16ENS1_13Float8_e4m3fnELb{residual}E"
VARIANTS = {"norm": NORM.format(residual=0), "add_norm": NORM.format(residual=1)}
"""What is fused to a part of the function's mangled name; bfloat16 to E4M3."""

CHANNELS = 16
"""Of an iteration of each loop over a row: four loads of four channels."""

_FUNCTION = re.compile(r"^\.text\.(?P<name>\S+):\n(?P<sass>.*?)(?=^//-|\Z)", re.M | re.S)
_USAGE = r"Function {}:\s+REG:(?P<registers>\d+)\s+STACK:(?P<stack>\d+)\s+SHARED:(?P<shared>\d+)"


def cuda_gates(library: Path) -> Iterator[Gate]:
    """RMS norm and per-token FP8, with and without the residual."""
    for kind, part in VARIANTS.items():
        name = f"vLLM CUDA rms_norm_dynamic_per_token_quant {kind} E4M3"
        yield Gate(name, HOPPER, partial(_read, library, part), _per_channel)


def _per_channel(compiled: Compiled) -> float:
    """Instructions of the three passes over a row; loops over single channels are for odd rows."""
    passes = [body for body in loops(compiled.sass) if _is_wide(body)]
    return sum(map(len, passes)) / CHANNELS


def _is_wide(body: list[str]) -> bool:
    loads = [width(text) for text in body if opcode(text) == "LDG"]
    return bool(loads) and min(loads) >= 8


def _read(library: Path, part: str) -> Compiled:
    """The function whose mangled name has this part.

    Raises:
        LookupError: the library has no such function for this GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [str(TOOLS / "cuobjdump"), "-xelf", ARCH, str(library.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            if part.encode() in cubin.read_bytes():
                return _function(cubin, part)
    raise LookupError(f"{library} has no function like {part} for {ARCH}; take a CUDA wheel's")


def _function(cubin: Path, part: str) -> Compiled:
    sass = _run("nvdisasm", "-c", cubin)
    match = next(found for found in _FUNCTION.finditer(sass) if part in found["name"])
    pattern = _USAGE.format(re.escape(match["name"]))
    usage = re.search(pattern, _run("cuobjdump", "-res-usage", cubin))
    assert usage is not None
    registers, stack, shared = (int(usage[name]) for name in ("registers", "stack", "shared"))
    return Compiled(match["sass"], "", registers, stack, local=0, shared=shared)


def _run(tool: str, flag: str, cubin: Path) -> str:
    command = [str(TOOLS / tool), flag, str(cubin)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout
