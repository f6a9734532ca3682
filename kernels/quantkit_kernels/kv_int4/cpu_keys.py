"""LLVM IR of queries times keys: 16 tokens in the lanes, so that no lanes are summed.

A key's bytes are contiguous. Those of 16 tokens are transposed, four bytes of each to a vector.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import floats
from quantkit_kernels.cpu.arithmetic import LINE_BYTES
from quantkit_kernels.cpu.ir import I32, I64, LANES, VECTOR_F32, VECTOR_I32, Emitter
from quantkit_kernels.kv_int4.cpu_entry import VECTOR_BYTES, broadcast, decoded
from quantkit_kernels.kv_int4.cpu_variant import BASE_BYTES, TILE, TILE_BYTES, TOKENS, AttendVariant

FOUR_WORDS = ir.VectorType(I32, 4)

LOW_NIBBLES = 0x0F0F0F0F
"""Of the bytes of a word."""

MIN_CHAINS = 4
"""Independent sums that hide the latency of a multiply-add."""


def build_keys(module: ir.Module, variant: AttendVariant) -> ir.Function:
    """keys(rows, bases, groups, logits): products of rows with keys, before `Row.FACTOR`.

    rows: prepared queries. bases: per 16 tokens, a block's address and the first token.
    logits: [rows, tile] float32.
    """
    e = Emitter(module, "keys", 4)
    _Keys(e, variant).emit()
    e.b.ret_void()
    return e.function


class _Keys:
    def __init__(self, e: Emitter, variant: AttendVariant) -> None:
        self.e, self.variant, self.layout = e, variant, variant.layout
        self.rows, self.bases, self.groups, self.logits = e.args

    def emit(self) -> None:
        e, layout = self.e, self.layout
        with e.loop(self.groups) as group:
            entry = e.at(self.bases, (group.index, BASE_BYTES))
            base, token = place(e, entry)
            codes = e.at(base, (token, layout.half))
            ask_for_codes(e, entry, layout.half, 0)
            self._ask_for_words(entry)
            words = e.at(base, (e.number(layout.key_words_at), 1), (token, 2))
            totals = [floats(0.0)] * self.variant.rows
            for byte in range(0, layout.half, self.variant.unit):
                totals = self._bytes(codes, words, byte, totals)
            target = e.at(self.logits, (group.index, VECTOR_BYTES))
            for row, total in enumerate(totals):
                e.store(total, target, TILE_BYTES * row)

    def _ask_for_words(self, entry: ir.Value) -> None:
        """Of 16 tokens of the next tile, keys' and values'."""
        e, layout = self.e, self.layout
        base, token = place(e, entry, TILE)
        words = e.at(base, (e.number(layout.key_words_at), 1), (token, 2))
        for plane in range(layout.key_groups + layout.value_groups):
            e.prefetch(words, 2 * layout.block_size * plane, level=2)

    def _bytes(
        self, codes: ir.Value, words: ir.Value, byte: int, totals: list[ir.Value]
    ) -> list[ir.Value]:
        """totals + the share of `unit` bytes: a unit of low codes, and one of high codes."""
        e, layout, unit = self.e, self.layout, self.variant.unit
        raw = [
            word
            for start in range(byte, byte + unit, 16)
            for word in transposed(e, codes, start, layout.half)
        ]
        multiply = self._integers if self.variant.integers else self._floats
        for shift, dimension in ((0, byte), (4, byte + layout.half)):
            products = multiply(raw, shift, dimension)
            group = dimension // layout.key_dimensions
            scale, zero = decoded(e, e.b.add(words, e.number(2 * layout.block_size * group)))
            negative = e.b.fneg(zero)
            for row, product in enumerate(products):
                offset = row * self.variant.row_bytes + self.variant.sums_at
                total = broadcast(e, self.rows, offset + 4 * (dimension // unit))
                shifted = e.fma(negative, total, product)
                totals[row] = e.fma(scale, shifted, totals[row])
        return totals

    def _floats(self, raw: Sequence[ir.Value], shift: int, dimension: int) -> list[ir.Value]:
        """Float32 sums over a unit of q'[d] * code[d], for each row."""
        e, rows = self.e, self.variant.rows
        chains = max(1, MIN_CHAINS // rows)
        sums = [floats(0.0)] * (rows * chains)
        for i in range(4 * len(raw)):
            word, byte = divmod(i, 4)
            code = e.b.and_(e.b.lshr(raw[word], e.words(8 * byte + shift)), e.words(15))
            number = e.b.sitofp(code, VECTOR_F32)
            for row in range(rows):
                query = broadcast(e, self.rows, row * self.variant.row_bytes + 4 * (dimension + i))
                slot = row * chains + i % chains
                sums[slot] = e.fma(query, number, sums[slot])
        return [functools.reduce(e.b.fadd, sums[row * chains :][:chains]) for row in range(rows)]

    def _integers(self, raw: Sequence[ir.Value], shift: int, dimension: int) -> list[ir.Value]:
        """The same of queries in two bytes, 256 high + low: exact, and below 2**24."""
        e, rows, mask = self.e, self.variant.rows, self.e.words(LOW_NIBBLES)
        sums = [ir.Constant(VECTOR_I32, None)] * (2 * rows)
        for i, word in enumerate(raw):
            code = e.b.and_(e.b.lshr(word, e.words(shift)) if shift else word, mask)
            for slot in range(2 * rows):
                row, piece = divmod(slot, 2)
                offset = row * self.variant.row_bytes + piece * self.variant.padded
                query = broadcast(e, self.rows, offset + dimension + 4 * i, I32)
                sums[slot] = multiply_bytes(e, sums[slot], code, query)
        return [
            e.b.sitofp(e.b.add(e.b.shl(high, e.words(8)), low), VECTOR_F32)
            for high, low in zip(sums[::2], sums[1::2], strict=True)
        ]


def ask_for_codes(e: Emitter, entry: ir.Value, half: int, plane: int) -> None:
    """Ask for codes of 16 tokens of the next tile, whose place `bases` has too.

    They go to the second-level cache: the first is full of this tile, and it takes as long to
    arrive as this tile takes.
    """
    base, token = place(e, entry, TILE)
    start = e.at(e.b.add(base, e.number(plane)), (token, half))
    for line in range(0, TOKENS * half, LINE_BYTES):
        e.prefetch(start, line, level=2)


def place(e: Emitter, entry: ir.Value, ahead: int = 0) -> tuple[ir.Value, ir.Value]:
    """The address of a block and the first of 16 tokens in it, so many times 16 ahead."""
    base, token = (e.load(I64, entry, BASE_BYTES * ahead + 8 * i, align=8) for i in range(2))
    return base, token


def multiply_bytes(e: Emitter, total: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
    """total + the sum over four bytes a lane of left, unsigned, times right, signed."""
    return e.call("llvm.x86.avx512.vpdpbusd.512", VECTOR_I32, total, left, right)


def transposed(e: Emitter, codes: ir.Value, byte: int, stride: int) -> list[ir.Value]:
    """Bytes `byte` to `byte` + 15 of 16 tokens: four vectors, of four bytes of each token."""
    quads = [
        joined(e, [e.load(FOUR_WORDS, codes, stride * token + byte, 1) for token in tokens])
        for tokens in (range(first, LANES, 4) for first in range(4))
    ]
    a, b, c, d = quads
    ab, cd = (_interleaved(e, *pair, 1) for pair in ((a, b), (c, d)))
    return [
        word for left, right in zip(ab, cd, strict=True) for word in _interleaved(e, left, right, 2)
    ]


def joined(e: Emitter, parts: list[ir.Value]) -> ir.Value:
    """Vectors one behind the other."""
    while len(parts) > 1:
        count = parts[0].type.count
        order = ir.Constant(ir.VectorType(I32, 2 * count), list(range(2 * count)))
        parts = [
            e.b.shuffle_vector(left, right, order)
            for left, right in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def _interleaved(e: Emitter, left: ir.Value, right: ir.Value, run: int) -> list[ir.Value]:
    """In each four lanes: the lower two of left and right, then the upper two, by runs of lanes."""
    results = []
    for upper in (0, 2):
        order = []
        for four in range(0, LANES, 4):
            for start in range(upper, upper + 2, run):
                for side in (0, LANES):
                    order += [side + four + start + i for i in range(run)]
        results.append(e.b.shuffle_vector(left, right, ir.Constant(VECTOR_I32, order)))
    return results
