"""LLVM IR that turns packed weight codes into what the unit of arithmetic multiplies."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Protocol

from llvmlite import ir

from quantkit_kernels.code_types import CODE_BOOKS, FLOAT8_DTYPES, CodeType, code_values
from quantkit_kernels.cpu.arithmetic import (
    LINE_BYTES,
    PANEL_BYTES,
    VECTORS,
    Arithmetic,
    sum_type,
)
from quantkit_kernels.cpu.ir import (
    I8,
    I16,
    LANES,
    VECTOR_F16,
    VECTOR_F32,
    VECTOR_I16,
    VECTOR_I32,
    Emitter,
)

HALVES, BYTES = ir.VectorType(I16, 2 * LANES), ir.VectorType(I8, 4 * LANES)

BOOK_FACTOR = {"nf4": 1.4375, "fp4": 12.0}
"""Code books are multiplied by this, and scales divided. FP4 becomes exact in bfloat16, and NF4,
rounded to one bfloat16, is off by 7.1e-4 of its norm instead of 1.1e-3."""

Step = list[list[ir.Value]]
"""The panel's two vectors, for each piece of the weights of a step."""


class Weights(Protocol):
    """Where the inner loop reads weights from, a block of steps at a time.

    Attributes:
        name: for the name of the function.
        steps: in a block.
        reused: other rows than those in registers will be multiplied by the same weights.
    """

    name: str
    steps: int
    reused: bool

    def block(self, e: Emitter, address: ir.Value, index: ir.Value) -> list[Step]:
        """The weights of each step of a block."""


class Tile:
    """Unpacked weights: [steps, pieces, 32] lanes of 32 bits, asked for `prefetch` bytes ahead."""

    steps = 4
    reused = True

    def __init__(self, arithmetic: Arithmetic, name: str = "tile", prefetch: int = 0) -> None:
        self.name, self.prefetch = name, prefetch
        self.pieces, self.lanes = arithmetic.weight_pieces, sum_type(arithmetic)

    def block(self, e: Emitter, address: ir.Value, index: ir.Value) -> list[Step]:
        """As in `Weights`."""
        stride = self.pieces * PANEL_BYTES
        start = e.at(address, (index, self.steps * stride))
        _ask_for(e, start, self.steps * stride, self.prefetch)
        return [
            [
                [
                    e.load(self.lanes, start, step * stride + piece * PANEL_BYTES + v)
                    for v in VECTORS
                ]
                for piece in range(self.pieces)
            ]
            for step in range(self.steps)
        ]


class Codes:
    """Packed weights: int32 [words, 32], unpacked in registers; a block is a word.

    Pair i of a word holds channel 2 i at bit i * bits and channel 2 i + 1 at bit i * bits + 16.
    Codes are asked for `prefetch` bytes ahead.
    """

    name = "codes"
    reused = False

    def __init__(self, arithmetic: Arithmetic, prefetch: int = 0) -> None:
        self.arithmetic, self.prefetch = arithmetic, prefetch
        self.bits = arithmetic.bits
        self.steps = 32 // self.bits // arithmetic.channels

    def block(self, e: Emitter, address: ir.Value, index: ir.Value) -> list[Step]:
        """As in `Weights`."""
        start = e.at(address, (index, PANEL_BYTES))
        _ask_for(e, start, PANEL_BYTES, self.prefetch)
        words = [e.load(VECTOR_I32, start, v) for v in VECTORS]
        vectors = [self._steps(e, word) for word in words]
        return [
            [list(piece) for piece in zip(*step, strict=True)]
            for step in zip(*vectors, strict=True)
        ]

    def _steps(self, e: Emitter, word: ir.Value) -> list[list[ir.Value]]:
        """The pieces of each step of a word."""
        a, steps = self.arithmetic, range(self.steps)
        if a.unit == "fma":
            return [[self._as_float(e, word, *divmod(step, 2))] for step in steps]
        if a.bits == 4:
            tables = _halves_tables(a)
            return [[self._look_up(e, word, step, table) for table in tables] for step in steps]
        if a.byte_tables:
            return [[pair] for pair in _look_up_bytes(e, word, a.code_type)]
        return [[self._convert(e, word, step)] for step in steps]

    def _as_float(self, e: Emitter, word: ir.Value, pair: int, half: int) -> ir.Value:
        """A channel's number, as float32."""
        position = pair * self.bits + 16 * half
        if self.arithmetic.code_type == "int":
            top = e.b.shl(word, e.words(32 - self.bits - position))
            return e.b.sitofp(e.b.ashr(top, e.words(32 - self.bits)), VECTOR_F32)
        code = e.b.and_(e.b.lshr(word, e.words(position)), e.words(2**self.bits - 1))
        if self.arithmetic.code_type in FLOAT8_DTYPES:
            return float8_to_float(e, code, self.arithmetic.code_type)
        return self._look_up_float(e, code)

    def _look_up_float(self, e: Emitter, code: ir.Value) -> ir.Value:
        """The code book's float32: from a register, or from memory where a register is short."""
        values = book_values(self.arithmetic.code_type)
        if self.arithmetic.avx512:
            table = ir.Constant(VECTOR_F32, values)
            return e.call("llvm.x86.avx512.permvar.sf.512", VECTOR_F32, table, code)
        return e.gather_constants(f"book_{self.arithmetic.code_type}", values, code)

    def _look_up(self, e: Emitter, word: ir.Value, pair: int, table: ir.Constant) -> ir.Value:
        """Two 4-bit codes per lane as bfloat16, by a table in a register.

        The lookup reads the low five bits of each 16-bit index. The fifth belongs to the next
        code: a table that repeats after 16 entries ignores it.
        """
        index = e.b.bitcast(e.b.lshr(word, e.words(self.bits * pair)), HALVES)
        found = e.call("llvm.x86.avx512.permvar.hi.512", HALVES, table, index)
        return e.b.bitcast(found, VECTOR_F32)

    def _convert(self, e: Emitter, word: ir.Value, pair: int) -> ir.Value:
        """Two codes per lane as bfloat16: the upper half of their float32, which is exact."""
        low, high = (
            e.b.bitcast(self._as_float(e, word, pair, half), VECTOR_I32) for half in (0, 1)
        )
        return e.b.bitcast(e.b.or_(e.b.lshr(low, e.words(16)), high), VECTOR_F32)


def _ask_for(e: Emitter, start: ir.Value, size: int, distance: int) -> None:
    """Ask for the cache lines of a block that lies `distance` bytes ahead; 0 asks for none.

    They go to the second-level cache: the first is full of what is multiplied now.
    """
    for line in range(0, size if distance else 0, LINE_BYTES):
        e.prefetch(start, distance + line, level=2)


def book_values(code_type: CodeType) -> list[float]:
    """The number of each 4-bit code, times `BOOK_FACTOR`; integers are two's complement."""
    if code_type == "int":
        return [float(code - 16 * (code > 7)) for code in range(16)]
    return [value * BOOK_FACTOR[code_type] for value in CODE_BOOKS[code_type]]


def float8_to_float(e: Emitter, code: ir.Value, code_type: CodeType) -> ir.Value:
    """The float32 of an 8-bit float in the low byte of each int32 lane.

    The bits become those of a float16, whose conversion is exact for subnormals in every mode of
    the CPU. E4M3's exponents are 8 less than float16's, and its NaN is none there.
    """
    if code_type == "e5m2":
        return _half_to_float(e, e.b.shl(code, e.words(8)))
    magnitude = e.b.and_(code, e.words(0x7F))
    sign = e.b.shl(e.b.and_(code, e.words(0x80)), e.words(8))
    small = _half_to_float(e, e.b.or_(e.b.shl(magnitude, e.words(7)), sign))
    value = e.b.fmul(small, ir.Constant(VECTOR_F32, [256.0] * LANES))
    is_nan = e.b.icmp_signed("==", magnitude, e.words(0x7F))
    return e.b.select(is_nan, ir.Constant(VECTOR_F32, [float("nan")] * LANES), value)


def _half_to_float(e: Emitter, bits: ir.Value) -> ir.Value:
    return e.b.fpext(e.b.bitcast(e.b.trunc(bits, VECTOR_I16), VECTOR_F16), VECTOR_F32)


def _halves_tables(arithmetic: Arithmetic) -> list[ir.Constant]:
    """The bfloat16 bits of each 4-bit code, twice over; a table for each piece of a weight."""
    rest, tables = book_values(arithmetic.code_type), []
    for _ in range(arithmetic.weight_pieces):
        piece = [bf16_bits(value) for value in rest]
        tables.append(ir.Constant(HALVES, piece * 2))
        rest = [value - _bf16(bits) for value, bits in zip(rest, piece, strict=True)]
    return tables


def _look_up_bytes(e: Emitter, word: ir.Value, code_type: CodeType) -> Sequence[ir.Value]:
    """The two pairs of bfloat16 of a word's four 8-bit codes."""
    index = e.b.bitcast(word, BYTES)
    low, high = (
        _integer_bytes(e, index) if code_type == "int" else _float_bytes(e, index, code_type)
    )
    lows, highs = (e.b.bitcast(value, HALVES) for value in (low, high))
    eight, lower, upper = (
        ir.Constant(HALVES, [value] * 2 * LANES) for value in (8, 0x00FF, 0xFF00)
    )
    first = e.b.or_(e.b.and_(lows, lower), e.b.shl(highs, eight))
    second = e.b.or_(e.b.lshr(lows, eight), e.b.and_(highs, upper))
    return [e.b.bitcast(pair, VECTOR_F32) for pair in (first, second)]


def _float_bytes(e: Emitter, index: ir.Value, code_type: CodeType) -> list[ir.Value]:
    """Lower and upper byte of 8-bit floats: those of their magnitudes, and the sign."""
    bits = [bf16_bits(value) for value in code_values(code_type)[:128].tolist()]
    low, high = (_permute(e, bits, shift, index) for shift in (0, 8))
    sign = e.b.and_(index, ir.Constant(BYTES, [-128] * 4 * LANES))
    return [low, e.b.or_(high, sign)]


def _integer_bytes(e: Emitter, index: ir.Value) -> list[ir.Value]:
    """Lower and upper byte of integers: from one table or, below 0, another."""
    positive = [bf16_bits(value) for value in range(128)]
    negative = [bf16_bits(value - 128) for value in range(128)]
    is_negative = e.b.icmp_signed("<", index, ir.Constant(BYTES, [0] * 4 * LANES))
    return [
        e.b.select(is_negative, *(_permute(e, bits, shift, index) for bits in (negative, positive)))
        for shift in (0, 8)
    ]


def _permute(e: Emitter, bits: list[int], shift: int, index: ir.Value) -> ir.Value:
    """The byte at bit `shift` of bits[index mod 128], for 64 indices."""
    table = [number >> shift & 0xFF for number in bits]
    lower, upper = (ir.Constant(BYTES, part) for part in (table[:64], table[64:]))
    return e.call("llvm.x86.avx512.vpermi2var.qi.512", BYTES, lower, index, upper)


def bf16_bits(value: float) -> int:
    """The bit pattern of the bfloat16 nearest to `value`, half to even; NaN stays NaN."""
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    if math.isnan(value):
        return bits >> 16 | 0x40
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _bf16(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])
