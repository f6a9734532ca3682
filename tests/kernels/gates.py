"""What a compiled kernel must be before any GPU has run it, and what has been recorded of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import triton

from quantkit_kernels.tuning import Device
from tests.kernels.aot import Compiled
from tests.kernels.sass import longest_loop, opcode, width

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "kernel_report.json"
TOLERANCE = 1.05
"""Times the recorded instructions per value that a kernel may have."""

TRITON = ".".join(triton.__version__.split(".")[:2])
"""The compiler that a record belongs to, as major.minor."""

MARKS = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="TRITON_INTERPRET=1 turns the compiler off; unset it to run these tests.",
    ),
]


@dataclass(frozen=True)
class Gate:
    """One kernel as some GPU will run it, and what it must pass.

    Attributes:
        name: unique; the record's key, and the test's.
        device: the GPU.
        build: compiles it.
        per_value: instructions per thread for each weight, channel or cached value that the thread
            handles; None where nothing is counted.
        products: the tensor cores' instruction in the main loop; None where there is none.
        loads: 16-byte asynchronous loads of a thread in the main loop, at least.
        direct: operands go from memory to the tensor cores without a store to shared memory and
            without a load that the loop waits for.
        spill: bytes of stack allowed: 0, or a figure that its gate explains.
    """

    name: str
    device: Device
    build: Callable[[], Compiled]
    per_value: Callable[[Compiled], float] | None = None
    products: str | None = None
    loads: int = 0
    direct: bool = False
    spill: int = 0

    def __str__(self) -> str:
        return self.name

    def check(self) -> Compiled:
        """Compile; fail where the kernel spills, waits, takes the long way or has grown."""
        compiled = self.build()
        self._check_memory(compiled)
        self._check_loop(compiled)
        if self.per_value is not None:
            allowed = recorded(self.name) * TOLERANCE
            assert self.per_value(compiled) <= allowed, "more instructions than recorded"
        return compiled

    def _check_memory(self, compiled: Compiled) -> None:
        assert compiled.stack <= self.spill
        if not self.spill:
            assert not {"LDL", "STL"} & set(compiled.opcodes)
        assert compiled.local == 0
        assert compiled.shared <= self.device.shared_bytes

    def _check_loop(self, compiled: Compiled) -> None:
        loop = compiled.main_loop
        assert not {"LDL", "STL"} & set(loop)
        if self.products is not None:
            assert loop[self.products] > 0, "no tensor cores"
        if self.loads:
            loads = [text for text in longest_loop(compiled.sass) if opcode(text) == "LDGSTS"]
            assert sum(width(text) == 16 for text in loads) >= self.loads
        if self.direct:
            assert loop["STS"] == 0, "operands go through shared memory"
            assert loop["LDG"] == 0, "a load in the loop is not asynchronous"


@cache
def _records() -> dict[str, float]:
    report = json.loads(RECORD.read_text())["compilers"].get(TRITON)
    if report is None:
        raise LookupError(f"{RECORD.name} has nothing of Triton {TRITON}; run `make kernel-report`")
    return {row["name"]: row["per_value"] for row in report["kernels"]}


def recorded(name: str) -> float:
    """Instructions per value that `make kernel-report` wrote down.

    Raises:
        LookupError: none were.
    """
    found = _records().get(name)
    if found is None:
        raise LookupError(f"{name!r} is not in {RECORD.name}; run `make kernel-report`")
    return found
