"""LLVM IR that turns a tile's products into weights of its values: online softmax, base 2.

Online normaliser: arXiv 1805.02867.
"""

from __future__ import annotations

from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import floats, to_integer
from quantkit_kernels.cpu.ir import F32, I32, LANES, VECTOR_F32, VECTOR_I8, VECTOR_I32, Emitter
from quantkit_kernels.kv_int4.cpu_entry import (
    VECTOR_BYTES,
    broadcast,
    decoded,
    exp2,
    first_lane,
    folded,
    larger,
    tanh,
)
from quantkit_kernels.kv_int4.cpu_keys import place
from quantkit_kernels.kv_int4.cpu_variant import (
    BASE_BYTES,
    PIECE_BYTES,
    STEPS,
    TILE_BYTES,
    TOKENS,
    AttendVariant,
    Partial,
    Row,
)

LOWEST = -1e30
"""The maximum of no logits: finite, so that differences of maxima are numbers."""

LARGEST = 65535
"""The largest number of two unsigned bytes."""

TINY = 1e-30
"""What weights of 0 are divided by."""

MINUS_INFINITY = float("-inf")


def build_scales(module: ir.Module, variant: AttendVariant) -> ir.Function:
    """scales(bases, groups, target): scales and zero-points of a tile's values, as `Frame` says."""
    e, layout = Emitter(module, "scales", 3), variant.layout
    bases, groups, target = e.args
    with e.loop(groups) as group:
        entry = e.at(bases, (group.index, BASE_BYTES))
        base, token = place(e, entry)
        words = e.at(base, (e.number(layout.value_words_at), 1), (token, 2))
        into = e.at(target, (group.index, VECTOR_BYTES))
        for i in range(layout.value_groups):
            pair = decoded(e, e.b.add(words, e.number(2 * layout.block_size * i)))
            for j, vector in enumerate(pair):
                e.store(vector, into, TILE_BYTES * (2 * i + j))
    e.b.ret_void()
    return e.function


def build_softmax(module: ir.Module, variant: AttendVariant) -> ir.Function:
    """softmax(...), one row of a tile; arguments as in `_Softmax`, all but two addresses.

    row: the prepared query. logits: products, made logits. position: of the
    tile's first token. partial: the row's sums and maximum. scales: of the tile's values.
    """
    e = Emitter(module, "softmax", 10)
    _Softmax(e, variant).emit()
    e.b.ret_void()
    return e.function


class _Softmax:
    def __init__(self, e: Emitter, variant: AttendVariant) -> None:
        self.e, self.variant = e, variant
        (
            self.row, self.logits, self.weights, self.numbers, self.corrections,
            self.decay, self.groups, self.position, self.partial, self.scales,
        ) = e.args  # fmt: skip

    def emit(self) -> None:
        """Logits, their maximum, weights, and what the earlier sums become."""
        e, at = self.e, 4 * self.variant.padded
        before = broadcast(e, self.partial, at + Partial.MAXIMUM)
        highest = larger(e, folded(e, self._logits(), lambda x, y: larger(e, x, y)), before)
        decay = exp2(e, e.b.fsub(before, highest))
        total, *corrections = (
            first_lane(e, folded(e, value, e.b.fadd)) for value in self._weights(highest)
        )
        total = e.b.fadd(
            e.b.fmul(e.load(F32, self.partial, at + Partial.TOTAL), first_lane(e, decay)), total
        )
        e.store(first_lane(e, highest), self.partial, at + Partial.MAXIMUM)
        e.store(total, self.partial, at + Partial.TOTAL)
        e.store(first_lane(e, decay), self.decay)
        for i, correction in enumerate(corrections):
            e.store(correction, self.corrections, 4 * i)
        for i in range(self.variant.layout.value_groups if self.variant.integers else 0):
            self._round(i)

    def _logits(self) -> ir.Value:
        """Write logits, -inf where a token is not seen; returns their maximum, lane by lane."""
        e, b, at = self.e, self.e.b, self.variant.fields_at
        factor, extra = (broadcast(e, self.row, at + f) for f in (Row.FACTOR, Row.EXTRA))
        first, stop = (broadcast(e, self.row, at + f, I32) for f in (Row.FIRST, Row.STOP))
        lanes = ir.Constant(VECTOR_I32, list(range(LANES)))
        start = b.add(e.splat(b.trunc(self.position, I32)), lanes)
        with e.loop(self.groups, [floats(LOWEST), start]) as group:
            highest, positions = group.values
            address = e.at(self.logits, (group.index, VECTOR_BYTES))
            logit = e.fma(e.load(VECTOR_F32, address), factor, extra)
            if self.variant.softcap:
                cap = broadcast(e, self.row, at + Row.SOFTCAP)
                logit = b.fmul(tanh(e, logit), cap)
            seen = b.and_(
                b.icmp_signed(">=", positions, first), b.icmp_signed("<", positions, stop)
            )
            logit = b.select(seen, logit, floats(MINUS_INFINITY))
            e.store(logit, address)
            group.next_values = [larger(e, logit, highest), b.add(positions, e.words(TOKENS))]
        return group.values[0]

    def _weights(self, highest: ir.Value) -> list[ir.Value]:
        """Write p * scale; returns the sums of p, and of p * scale * zero of each value group."""
        e, b, count = self.e, self.e.b, self.variant.layout.value_groups
        with e.loop(self.groups, [floats(0.0)] * (1 + count)) as group:
            offset = (group.index, VECTOR_BYTES)
            logit = e.load(VECTOR_F32, e.at(self.logits, offset))
            hidden = b.fcmp_ordered("==", logit, floats(MINUS_INFINITY))
            p = b.select(hidden, floats(0.0), exp2(e, b.fsub(logit, highest)))
            scales, weights = (e.at(base, offset) for base in (self.scales, self.weights))
            sums = [b.fadd(group.values[0], p)]
            for i in range(count):
                scale, zero = (
                    e.load(VECTOR_F32, scales, TILE_BYTES * (2 * i + j)) for j in range(2)
                )
                # The scale of a token that is not seen may be NaN.
                weight = b.select(hidden, floats(0.0), b.fmul(p, scale))
                e.store(weight, weights, TILE_BYTES * i)
                sums.append(e.fma(weight, zero, group.values[1 + i]))
            group.next_values = sums
        return list(group.values)

    def _round(self, plane: int) -> None:
        """Weights as integers: weight = step * (256 high + low), both bytes unsigned.

        One that is NaN has made the correction NaN.
        """
        e, b = self.e, self.e.b
        weights = b.add(self.weights, e.number(TILE_BYTES * plane))
        numbers = b.add(self.numbers, e.number(2 * PIECE_BYTES * plane))
        with e.loop(self.groups, [floats(TINY)]) as group:
            weight = e.load(VECTOR_F32, e.at(weights, (group.index, VECTOR_BYTES)))
            group.next_values = [larger(e, weight, group.values[0])]
        highest = folded(e, group.values[0], lambda x, y: larger(e, x, y))
        step = b.fmul(highest, floats(1 / LARGEST))
        e.store(first_lane(e, step), self.corrections, STEPS + 4 * plane)
        inverse = b.fdiv(floats(1.0), step)
        with e.loop(self.groups) as group:
            weight = e.load(VECTOR_F32, e.at(weights, (group.index, VECTOR_BYTES)))
            number = to_integer(e, b.fmul(weight, inverse))
            number = e.call("llvm.smin.v16i32", VECTOR_I32, number, e.words(LARGEST))
            target = e.at(numbers, (group.index, TOKENS))
            e.store(b.trunc(b.lshr(number, e.words(8)), VECTOR_I8), target, 0, align=1)
            e.store(b.trunc(number, VECTOR_I8), target, PIECE_BYTES, align=1)
