"""LLVM IR of weights times values: dimensions in the lanes, sums in registers."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from quantkit_kernels.cpu.ir import I8, I32, LANES, VECTOR_F32, VECTOR_I32, Emitter
from quantkit_kernels.kv_int4.cpu_entry import VECTOR_BYTES, broadcast, nibbles
from quantkit_kernels.kv_int4.cpu_keys import (
    FOUR_WORDS,
    LOW_NIBBLES,
    ask_for_codes,
    joined,
    multiply_bytes,
    place,
)
from quantkit_kernels.kv_int4.cpu_variant import (
    BASE_BYTES,
    PIECE_BYTES,
    ROW_FIELDS,
    STEPS,
    TILE_BYTES,
    TOKENS,
    AttendVariant,
)

MAX_SUMS = 16
"""Vectors of sums that registers hold beside numbers that were converted."""

MAX_INTEGER_SUMS = 24
"""Those beside codes."""

BYTES = ir.VectorType(I8, 4 * LANES)

FOUR_TOKENS = ir.Constant(
    ir.VectorType(I32, 4 * LANES), [16 * token + i for i in range(LANES) for token in range(4)]
)
"""The bytes of four tokens, 16 each, by lanes: byte i of each token."""


def build_values(module: ir.Module, variant: AttendVariant) -> ir.Function:
    """values(bases, groups, weights, corrections, decays, partials): sums of all rows of a tile.

    sums[r, d] = decays[r] sums[r, d] + sum_t weights[r, t] code[t, d] - corrections[r].
    """
    e = Emitter(module, "values", 6)
    values = _Integers(e, variant) if variant.integers else _Floats(e, variant)
    for byte in range(0, variant.layout.half, values.bytes):
        values.emit(byte)
    e.b.ret_void()
    return e.function


class _Values:
    """What both kinds of arithmetic share; `bytes` of a value are served at a time."""

    bytes = LANES

    def __init__(self, e: Emitter, variant: AttendVariant) -> None:
        self.e, self.variant, self.layout = e, variant, variant.layout
        self.bases, self.groups, self.weights, self.corrections, self.decays, self.partials = e.args

    def emit(self, byte: int) -> None:
        """The sums of `bytes` bytes of a value, from `byte` on."""
        raise NotImplementedError

    def slots(self, byte: int) -> list[tuple[int, int]]:
        """The row and the first dimension of each vector of sums."""
        dimensions = [
            first + at
            for at in range(byte, byte + self.bytes, LANES)
            for first in (0, self.layout.half)
        ]
        return [(row, d) for row in range(self.variant.rows) for d in dimensions]

    def group(self, dimension: int) -> int:
        """The value group of a dimension."""
        return dimension // self.layout.value_dimensions

    def before(self, row: int, dimension: int) -> ir.Value:
        """What a sum starts from: earlier tiles' share, less the tile's zero-points'."""
        e = self.e
        sums = e.load(VECTOR_F32, self.partials, row * self.variant.partial_bytes + 4 * dimension)
        offset = row * ROW_FIELDS + 4 * self.group(dimension)
        correction = broadcast(e, self.corrections, offset)
        return e.fma(sums, broadcast(e, self.decays, 4 * row), e.b.fneg(correction))

    def store(self, slots: list[tuple[int, int]], sums: Sequence[ir.Value]) -> None:
        """Write the sums."""
        for (row, d), total in zip(slots, sums, strict=True):
            self.e.store(total, self.partials, row * self.variant.partial_bytes + 4 * d)

    def codes(self, group: ir.Value, byte: int) -> ir.Value:
        """The address of the codes of 16 tokens; asks for those of the next tile."""
        e, layout = self.e, self.layout
        entry = e.at(self.bases, (group, BASE_BYTES))
        if not byte:
            ask_for_codes(e, entry, layout.half, layout.value_codes_at)
        base, token = place(e, entry)
        first = e.b.add(base, e.number(layout.value_codes_at + byte))
        return e.at(first, (token, layout.half))


class _Floats(_Values):
    """Weights and codes as float32; weights are [rows, value_groups] planes of a tile."""

    def __init__(self, e: Emitter, variant: AttendVariant) -> None:
        super().__init__(e, variant)
        self.bytes = _most_bytes(variant, MAX_SUMS // 2)

    def emit(self, byte: int) -> None:
        """As in `_Values`."""
        e, slots = self.e, self.slots(byte)
        with e.loop(self.groups, [self.before(*slot) for slot in slots]) as group:
            codes = self.codes(group.index, byte)
            weights, sums = e.at(self.weights, (group.index, VECTOR_BYTES)), list(group.values)
            for token in range(TOKENS):
                numbers = self._numbers(e.b.add(codes, e.number(token * self.layout.half)), byte)
                for slot, (row, d) in enumerate(slots):
                    plane = row * self.layout.value_groups + self.group(d)
                    weight = broadcast(e, weights, TILE_BYTES * plane + 4 * token)
                    sums[slot] = e.fma(weight, numbers[d], sums[slot])
            group.next_values = sums
        self.store(slots, group.values)

    def _numbers(self, codes: ir.Value, byte: int) -> dict[int, ir.Value]:
        """A token's codes by their first dimension."""
        found: dict[int, ir.Value] = {}
        for at in range(0, self.bytes, LANES):
            low, high = nibbles(self.e, self.e.b.add(codes, self.e.number(at)))
            found |= {byte + at: low, byte + at + self.layout.half: high}
        return found


class _Integers(_Values):
    """Weights as two unsigned bytes, [rows, value_groups, 2] planes; four tokens a lane."""

    def emit(self, byte: int) -> None:
        """As in `_Values`: exact sums over a tile, then their float32."""
        e, slots = self.e, self.slots(byte)
        both = 2 * len(slots) <= MAX_INTEGER_SUMS
        if both:
            sums = self._sums(byte, slots, (0, 1))
            high, low = sums[: len(slots)], sums[len(slots) :]
        else:
            high, low = (self._sums(byte, slots, (piece,)) for piece in (0, 1))
        totals = []
        for (row, d), upper, lower in zip(slots, high, low, strict=True):
            whole = e.b.add(e.b.shl(upper, e.words(8)), lower)
            step = broadcast(e, self.corrections, row * ROW_FIELDS + STEPS + 4 * self.group(d))
            totals.append(e.fma(e.b.sitofp(whole, VECTOR_F32), step, self.before(row, d)))
        self.store(slots, totals)

    def _sums(
        self, byte: int, slots: list[tuple[int, int]], pieces: Sequence[int]
    ) -> list[ir.Value]:
        """Sums of each piece of the weights times codes, for all slots, int32."""
        e = self.e
        wanted = [(piece, *slot) for piece in pieces for slot in slots]
        with e.loop(self.groups, [e.words(0)] * len(wanted)) as group:
            codes, sums = self.codes(group.index, byte), list(group.values)
            weights = e.at(self.weights, (group.index, TOKENS))
            for token in range(0, TOKENS, 4):
                low, high = self._four(e.b.add(codes, e.number(token * self.layout.half)))
                for i, (piece, row, d) in enumerate(wanted):
                    plane = 2 * (row * self.layout.value_groups + self.group(d)) + piece
                    weight = broadcast(e, weights, PIECE_BYTES * plane + token, I32)
                    code = low if d < self.layout.half else high
                    sums[i] = multiply_bytes(e, sums[i], weight, code)
            group.next_values = sums
        return list(group.values)

    def _four(self, codes: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Low and high codes of 16 bytes of four tokens, a lane's four of one dimension."""
        e, stride = self.e, self.layout.half
        rows = joined(e, [e.load(FOUR_WORDS, codes, stride * token, 1) for token in range(4)])
        rows = e.b.bitcast(rows, BYTES)
        lanes = e.b.bitcast(e.b.shuffle_vector(rows, rows, FOUR_TOKENS), VECTOR_I32)
        mask = e.words(LOW_NIBBLES)
        return e.b.and_(lanes, mask), e.b.and_(e.b.lshr(lanes, e.words(4)), mask)


def _most_bytes(variant: AttendVariant, pairs: int) -> int:
    """Bytes of a value, a divisor of all, whose two vectors of sums a row fit in registers."""
    blocks = variant.layout.half // LANES
    fitting = [n for n in range(1, blocks + 1) if blocks % n == 0 and n * variant.rows <= pairs]
    return LANES * max(fitting, default=1)
