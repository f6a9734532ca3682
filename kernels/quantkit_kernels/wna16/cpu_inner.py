"""LLVM IR of the CPU kernel's inner functions: unpack codes, multiply a few rows by a panel.

Two units of arithmetic share every line but two. `bf16`: a step is two input channels, a pair of
bfloat16 in a 32-bit lane, and one AVX512-BF16 instruction multiplies and adds 16 pairs into
float32. `fma`: a step is one channel in float32, on any CPU.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Literal, Protocol

from llvmlite import ir

from quantkit_kernels.cpu_ir import (
    F32,
    I16,
    LANES,
    VECTOR_F32,
    VECTOR_I8,
    VECTOR_I32,
    Emitter,
)

Unit = Literal["bf16", "fma"]

PANEL = 32
"""Output columns in a panel: two vectors of 16 lanes."""

PANEL_BYTES = 4 * PANEL
"""Bytes of one 32-bit word of every column of a panel: the stride of most buffers."""

VECTORS = (0, 4 * LANES)
"""Byte offsets of a panel's two vectors."""

LINE_BYTES = 64
"""Bytes of a cache line."""

MAX_CHAINS = 4
"""Independent sums per output that hide the latency of a multiply-add when rows are few."""


@dataclass(frozen=True)
class Arithmetic:
    """What a kernel is generated for.

    Attributes:
        bits: width of a code, 4 or 8.
        unit: see above.
        max_rows: rows whose sums stay in registers.
    """

    bits: int
    unit: Unit
    max_rows: int


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

    def vectors(self, e: Emitter, address: ir.Value, block: ir.Value) -> list[list[ir.Value]]:
        """The panel's two vectors, as float32 lanes, for each step of a block."""


class Tile:
    """Unpacked weights: [steps, 32] lanes of 32 bits."""

    name = "tile"
    steps = 4
    reused = True

    def vectors(self, e: Emitter, address: ir.Value, block: ir.Value) -> list[list[ir.Value]]:
        """As in `Weights`."""
        start = e.at(address, (block, self.steps * PANEL_BYTES))
        return [
            [e.load(VECTOR_F32, start, step * PANEL_BYTES + v) for v in VECTORS]
            for step in range(self.steps)
        ]


class Codes:
    """Packed weights: int32 [words, 32], unpacked in registers; a block is a word.

    A code is two's complement. Pair i of a word holds channel 2 i at bit i * bits and channel
    2 i + 1 at bit i * bits + 16.
    """

    name = "codes"
    reused = False

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.bits, self.unit = arithmetic.bits, arithmetic.unit
        self.steps = (16 if self.unit == "bf16" else 32) // self.bits

    def vectors(self, e: Emitter, address: ir.Value, block: ir.Value) -> list[list[ir.Value]]:
        """As in `Weights`."""
        start = e.at(address, (block, PANEL_BYTES))
        words = [e.load(VECTOR_I32, start, v) for v in VECTORS]
        return [[self._step(e, word, step) for word in words] for step in range(self.steps)]

    def _step(self, e: Emitter, word: ir.Value, step: int) -> ir.Value:
        if self.unit == "fma":
            pair, half = divmod(step, 2)
            return self._as_float(e, word, pair * self.bits + 16 * half)
        pairs = self._look_up(e, word, step) if self.bits == 4 else self._convert(e, word, step)
        return e.b.bitcast(pairs, VECTOR_F32)

    def _as_float(self, e: Emitter, word: ir.Value, position: int) -> ir.Value:
        """The code at a bit position, as float32."""
        top = e.b.shl(word, e.words(32 - self.bits - position))
        return e.b.sitofp(e.b.ashr(top, e.words(32 - self.bits)), VECTOR_F32)

    def _look_up(self, e: Emitter, word: ir.Value, pair: int) -> ir.Value:
        """Two 4-bit codes per lane as bfloat16, by a table in a register.

        The lookup reads the low five bits of each 16-bit index. The fifth belongs to the next
        code: a table that repeats after 16 entries ignores it.
        """
        halves = ir.VectorType(I16, 2 * LANES)
        table = ir.Constant(halves, [_bf16_bits(code - 16 * (code > 7)) for code in range(16)] * 2)
        index = e.b.bitcast(e.b.lshr(word, e.words(self.bits * pair)), halves)
        return e.call("llvm.x86.avx512.permvar.hi.512", halves, table, index)

    def _convert(self, e: Emitter, word: ir.Value, pair: int) -> ir.Value:
        """Two codes per lane as bfloat16: the upper half of their float32, which is exact."""
        low, high = (
            e.b.bitcast(self._as_float(e, word, pair * self.bits + half), VECTOR_I32)
            for half in (0, 16)
        )
        return e.b.or_(e.b.lshr(low, e.words(16)), high)


def _bf16_bits(code: int) -> int:
    """The bit pattern of bfloat16(code), exact for eight significant bits."""
    return int(struct.unpack("<I", struct.pack("<f", code))[0]) >> 16


def build_unpack(module: ir.Module, codes: Codes) -> ir.Function:
    """unpack(source, tile, words): `words` words of a panel to a `Tile`."""
    e = Emitter(module, "unpack", 3)
    source, tile, words = e.args
    with e.loop(words) as word:
        target = e.at(tile, (word.index, codes.steps * PANEL_BYTES))
        # The panel's next group follows: it arrives while this one is multiplied.
        ahead = e.at(source, (e.b.add(word.index, words), PANEL_BYTES))
        for v in VECTORS:
            e.prefetch(ahead, v)
        for step, vectors in enumerate(codes.vectors(e, source, word.index)):
            for v, lanes in zip(VECTORS, vectors, strict=True):
                e.store(lanes, target, step * PANEL_BYTES + v)
    e.b.ret_void()
    return e.function


def build_multiply(
    module: ir.Module, arithmetic: Arithmetic, rows: int, weights: Weights
) -> ir.Function:
    """sums[r] += scales (x[r] . weights - zeros x_sums[r]): one panel, one group, `rows` rows.

    multiply(x, x_row, weights, steps, sums, scales, zeros, x_sums): x_sums float32 [rows], zeros
    may be null.
    """
    e = Emitter(module, f"multiply_{weights.name}_{rows}", 8)
    x, x_row, source, steps, sums, scales, zeros, x_sums = e.args
    inputs = [e.at(x, (e.number(row), x_row)) for row in range(rows + 1)]
    dots = _dots(e, arithmetic, inputs, weights, source, steps)
    dots = _without_zeros(e, dots, zeros, x_sums)
    scale = [e.load(VECTOR_F32, scales, v) for v in VECTORS]
    for row in range(rows):
        for i, v in enumerate(VECTORS):
            offset = row * PANEL_BYTES + v
            before = e.load(VECTOR_F32, sums, offset)
            e.store(e.fma(dots[2 * row + i], scale[i], before), sums, offset)
    e.b.ret_void()
    return e.function


def _dots(
    e: Emitter,
    arithmetic: Arithmetic,
    inputs: list[ir.Value],
    weights: Weights,
    source: ir.Value,
    steps: ir.Value,
) -> list[ir.Value]:
    """x . weights for each row and vector: [row 0 low, row 0 high, row 1 low, ...].

    `inputs` are the addresses of the rows and of the row that follows them.
    """
    *x, following = inputs
    width = 2 * len(x)
    chains = max(1, min(MAX_CHAINS, arithmetic.max_rows, weights.steps) // len(x))
    zero = ir.Constant(VECTOR_F32, [0.0] * LANES)
    blocks = e.b.sdiv(steps, e.number(weights.steps))
    with e.loop(blocks, [zero] * (width * chains)) as block:
        sums = list(block.values)
        if weights.reused:
            _prefetch_rows(e, following, block.index, 4 * weights.steps * len(x))
        for step, vectors in enumerate(weights.vectors(e, source, block.index)):
            for row, base in enumerate(x):
                address = e.at(base, (block.index, 4 * weights.steps))
                value = e.splat(e.load(F32, address, 4 * step, align=2))
                for i, weight in enumerate(vectors):
                    slot = (step % chains) * width + 2 * row + i
                    sums[slot] = _multiply_add(e, arithmetic.unit, value, weight, sums[slot])
        block.next_values = sums
    partial = [block.values[chain * width :][:width] for chain in range(chains)]
    return [functools.reduce(e.b.fadd, parts) for parts in zip(*partial, strict=True)]


def _prefetch_rows(e: Emitter, rows: ir.Value, block: ir.Value, size: int) -> None:
    """Ask for a block's share of the rows that come next: of many, not all stay in cache."""
    for line in range(0, size, LINE_BYTES):
        e.prefetch(e.at(rows, (block, size)), line)


def _multiply_add(e: Emitter, unit: Unit, x: ir.Value, weight: ir.Value, z: ir.Value) -> ir.Value:
    if unit == "fma":
        return e.fma(x, weight, z)
    pairs = [e.b.bitcast(value, VECTOR_I32) for value in (x, weight)]
    return e.call("llvm.x86.avx512bf16.dpbf16ps.512", VECTOR_F32, z, *pairs)


def _without_zeros(
    e: Emitter, dots: list[ir.Value], zeros: ir.Value, x_sums: ir.Value
) -> list[ir.Value]:
    """dots - zeros x_sums, skipped where zeros is null."""
    before = e.b.block
    with e.b.if_then(e.b.not_(e.is_null(zeros))):
        zero = [e.b.sitofp(e.load(VECTOR_I8, zeros, v // 4, align=1), VECTOR_F32) for v in VECTORS]
        negative = [
            e.splat(e.b.fneg(e.load(F32, x_sums, 4 * row))) for row in range(len(dots) // 2)
        ]
        corrected = [e.fma(negative[i // 2], zero[i % 2], dot) for i, dot in enumerate(dots)]
        inside = e.b.block
    merged = [e.b.phi(VECTOR_F32) for _ in dots]
    for phi, dot, better in zip(merged, dots, corrected, strict=True):
        phi.add_incoming(dot, before)
        phi.add_incoming(better, inside)
    return merged
