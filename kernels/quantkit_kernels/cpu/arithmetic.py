"""What a CPU kernel is generated for: codes, rows, and the unit of arithmetic that multiplies them.

Three units share every line but a few. `bf16`: a step is two input channels, a pair of bfloat16 in
a 32-bit lane, and one AVX512-BF16 instruction multiplies and adds 16 pairs into float32. `vnni`: a
step is four channels of integers, added exactly in 32 bits. `fma`: a step is one channel in
float32, on any CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llvmlite import ir

from quantkit_kernels.act_quant.rows import RowCode
from quantkit_kernels.code_types import CodeType
from quantkit_kernels.cpu.ir import LANES, VECTOR_F32, VECTOR_I32, Emitter

Unit = Literal["bf16", "vnni", "fma"]

PANEL = 32
"""Output columns in a panel: two vectors of 16 lanes."""

PANEL_BYTES = 4 * PANEL
"""Bytes of one 32-bit word of every column of a panel: the stride of most buffers."""

LINE_BYTES = 64
"""Bytes of a cache line."""

VECTORS = (0, 4 * LANES)
"""Byte offsets of a panel's two vectors."""

CHANNELS = {"bf16": 2, "vnni": 4, "fma": 1}
"""Input channels of a step, by unit: what fills 32 bits."""


@dataclass(frozen=True)
class Arithmetic:
    """What a kernel is generated for.

    Attributes:
        bits: width of a weight's code, 4 or 8.
        unit: see above.
        max_rows: rows whose sums stay in registers.
        code_type: what a weight's code stands for; integers are two's complement.
        row_code: codes of 8-bit rows; None for rows of floating-point numbers.
        weight_pieces: bfloat16 numbers that sum to a weight, where one is not enough (`nf4`).
        avx512: 16 lanes fill a register.
        byte_tables: the CPU looks bytes up in tables of 128 (AVX512-VBMI).
    """

    bits: int
    unit: Unit
    max_rows: int
    code_type: CodeType = "int"
    row_code: RowCode | None = None
    weight_pieces: int = 1
    avx512: bool = False
    byte_tables: bool = False

    @property
    def channels(self) -> int:
        """Input channels of a step."""
        return CHANNELS[self.unit]

    @property
    def direct_rows(self) -> int:
        """Most rows multiplied by codes as registers unpack them, beside tables of bytes."""
        if self.unit != "bf16" or self.bits != 8 or not self.byte_tables:
            return self.max_rows
        return 8 if self.code_type == "int" else 9

    @property
    def sums_are_integers(self) -> bool:
        """Rows and weights are integers: their product is summed in 32-bit integers."""
        return self.row_code == "int8"

    @property
    def row_shift(self) -> int:
        """What is added to a row's codes before they are multiplied: VNNI wants them unsigned."""
        return 128 if self.unit == "vnni" else 0


def sum_type(arithmetic: Arithmetic) -> ir.VectorType:
    """Lanes in which the inner loop sums."""
    return VECTOR_I32 if arithmetic.unit == "vnni" else VECTOR_F32


def multiply_add(e: Emitter, unit: Unit, x: ir.Value, weight: ir.Value, z: ir.Value) -> ir.Value:
    """x * weight + z for a step: all are lanes of `sum_type`."""
    if unit == "fma":
        return e.fma(x, weight, z)
    pair = [e.b.bitcast(value, VECTOR_I32) for value in (x, weight)]
    if unit == "vnni":
        return e.call("llvm.x86.avx512.vpdpbusd.512", VECTOR_I32, z, *pair)
    return e.call("llvm.x86.avx512bf16.dpbf16ps.512", VECTOR_F32, z, *pair)


def add(e: Emitter, left: ir.Value, right: ir.Value) -> ir.Value:
    """left + right, of integers or floating-point numbers."""
    return e.b.add(left, right) if left.type == VECTOR_I32 else e.b.fadd(left, right)
