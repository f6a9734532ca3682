"""LLVM IR of the CPU kernel: values of a row in float32 in cache, then its scales, then its codes.

A thread draws blocks of rows until none is left. It writes what is to be quantised (x, its norm, or
silu(gate) * up) to a float32 row on its stack, which stays in the first-level cache, and reads it
twice: for the range of each group, and for the codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import (
    ROUND_TO_INTEGER,
    SIZE,
    Float,
    bits_of,
    clamp,
    floats,
    lanes_below,
    load_floats,
    low_bits,
    narrow,
    silu,
    store_floats,
    to_e4m3,
    to_integer,
    widen,
)
from quantkit_kernels.act_quant.reference import SMALLEST_SCALE
from quantkit_kernels.act_quant.rows import LARGEST_CODE, RowCode
from quantkit_kernels.act_quant.source import Kind
from quantkit_kernels.cpu_ir import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    VECTOR_F32,
    VECTOR_I8,
    VECTOR_I32,
    Emitter,
)

COUNTER = "next_task"
"""The field of the argument block that threads draw blocks of rows from."""

FIELDS = (
    COUNTER, "tasks", "task_rows", "rows", "width", "x", "x_row", "residual", "residual_row",
    "total", "total_row", "weight", "epsilon", "scale", "zero", "bound", "groups", "group_vectors",
    "out", "out_row", "scales_at",
)  # fmt: skip
"""The int64 argument block: addresses, strides in bytes, and counts.

width: K. epsilon, bound: the bits of a float32. scale, zero: addresses of float32, null for dynamic
ones. group_vectors: vectors of 16 in a group.
"""

VECTOR_BYTES = 4 * LANES
UNROLL = 4
"""Vectors in an iteration of a loop."""

INFINITY_BITS = 0x7F800000
ZERO, ONE, LARGEST = (ir.Constant(F32, value) for value in (0.0, 1.0, torch.finfo().max))

Body = Callable[[ir.Value, ir.Value | None, list[ir.Value]], list[ir.Value]]
"""Emits what is done to a vector, given its number, the mask of its lanes (None for all) and the
carried values; returns the next ones."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is generated for.

    Attributes:
        source: what is quantised.
        x: dtype of x and residual.
        weight: dtype of the norm's weight.
        code: of the rows.
        symmetric: rows have no zero-point.
    """

    source: Kind
    x: Float
    weight: Float
    code: RowCode
    symmetric: bool


def build_module(variant: Variant) -> ir.Module:
    """The module whose `worker(arguments)` quantises blocks of rows until none is left."""
    module = ir.Module()
    _Worker(module, variant).emit()
    return module


class _Worker:
    """Emits `worker`; `a` holds the fields of its argument block."""

    def __init__(self, module: ir.Module, variant: Variant) -> None:
        self.e, self.variant = Emitter(module, "worker", 1), variant
        e = self.e
        self.a = {
            name: e.load(I64, e.args[0], 8 * i, align=8)
            for i, name in enumerate(FIELDS)
            if name != COUNTER
        }
        self.vectors = e.b.sdiv(e.b.add(self.a["width"], e.number(LANES - 1)), e.number(LANES))
        self.values = e.b.ptrtoint(e.b.alloca(VECTOR_F32, self.vectors), I64)

    def emit(self) -> None:
        """while (task = next_task++) < tasks: quantise its rows."""
        e, a = self.e, self.a
        head, body, done = (e.function.append_basic_block() for _ in range(3))
        e.b.branch(head)
        e.b.position_at_end(head)
        task = self._draw()
        e.b.cbranch(e.less(task, a["tasks"]), body, done)
        e.b.position_at_end(body)
        first = e.b.mul(task, a["task_rows"])
        with e.loop(e.minimum(a["task_rows"], e.b.sub(a["rows"], first))) as row:
            self._quantise(e.b.add(first, row.index))
        e.b.branch(head)
        e.b.position_at_end(done)
        e.b.ret_void()

    def _draw(self) -> ir.Value:
        """next_task++, atomically; it is the first field."""
        pointer = self.e.b.inttoptr(self.e.args[0], I64.as_pointer())
        return self.e.b.atomic_rmw("add", pointer, self.e.number(1), "monotonic")

    def _quantise(self, row: ir.Value) -> None:
        e, a = self.e, self.a
        x = e.at(a["x"], (row, a["x_row"]))
        if self.variant.source == "x":
            self._copy(x)
        elif self.variant.source == "silu_mul":
            self._gate(x)
        else:
            self._norm(x, row)
        out = e.at(a["out"], (row, a["out_row"]))
        scales = e.b.add(out, a["scales_at"])
        with e.loop(a["groups"], [ZERO]) as group:
            zero = self._quantise_group(group.index, out, scales)
            group.next_values = [zero]
        self._finish(out, scales, group.values[0])

    def _copy(self, x: ir.Value) -> None:
        """values = x."""

        def body(vector: ir.Value, mask: ir.Value | None, _: list[ir.Value]) -> list[ir.Value]:
            self._put(vector, self._get(self.variant.x, x, vector, mask))
            return []

        self._each_vector(body)

    def _gate(self, x: ir.Value) -> None:
        """values = silu(x[:K]) * x[K:]."""
        up = self.e.at(x, (self.a["width"], SIZE[self.variant.x]))

        def body(vector: ir.Value, mask: ir.Value | None, _: list[ir.Value]) -> list[ir.Value]:
            gate, factor = (self._get(self.variant.x, part, vector, mask) for part in (x, up))
            self._put(vector, self.e.b.fmul(silu(self.e, gate), factor))
            return []

        self._each_vector(body)

    def _norm(self, x: ir.Value, row: ir.Value) -> None:
        """values = x / sqrt(mean(x^2) + epsilon) * weight, with the residual added to x first."""
        e, a, kind = self.e, self.a, self.variant.x
        add = self._adder(row) if self.variant.source == "add_norm" else None

        def square(vector: ir.Value, mask: ir.Value | None, sums: list[ir.Value]) -> list[ir.Value]:
            value = self._get(kind, x, vector, mask)
            value = add(value, vector, mask) if add else value
            self._put(vector, value)
            return [*sums[1:], e.fma(value, value, sums[0])]

        # As many sums as vectors at a time hide the latency of adding to one.
        sums = self._each_vector(square, [floats(0.0)] * UNROLL)
        total = e.call(
            "llvm.vector.reduce.fadd.v16f32", F32, ZERO, functools.reduce(e.b.fadd, sums)
        )
        mean = e.b.fdiv(total, e.b.sitofp(a["width"], F32))
        epsilon = e.b.bitcast(e.b.trunc(a["epsilon"], I32), F32)
        root = e.call("llvm.sqrt.f32", F32, e.b.fadd(mean, epsilon))
        factor = e.splat(e.b.fdiv(ONE, root))

        def scale(vector: ir.Value, mask: ir.Value | None, _: list[ir.Value]) -> list[ir.Value]:
            weight = self._get(self.variant.weight, a["weight"], vector, mask)
            value = e.load(VECTOR_F32, e.at(self.values, (vector, VECTOR_BYTES)))
            self._put(vector, e.b.fmul(e.b.fmul(value, factor), weight))
            return []

        self._each_vector(scale)

    def _adder(self, row: ir.Value) -> Callable[[ir.Value, ir.Value, ir.Value | None], ir.Value]:
        """total = x + residual in the dtype of x, written, and returned as float32."""
        e, a, kind = self.e, self.a, self.variant.x
        residual, total = (e.at(a[name], (row, a[f"{name}_row"])) for name in ("residual", "total"))

        def add(value: ir.Value, vector: ir.Value, mask: ir.Value | None) -> ir.Value:
            stored = narrow(e, kind, e.b.fadd(value, self._get(kind, residual, vector, mask)))
            store_floats(e, kind, stored, e.at(total, (vector, SIZE[kind] * LANES)), mask)
            return widen(e, kind, stored)

        return add

    def _get(self, kind: Float, row: ir.Value, vector: ir.Value, mask: ir.Value | None) -> ir.Value:
        return load_floats(self.e, kind, self.e.at(row, (vector, SIZE[kind] * LANES)), mask)

    def _put(self, vector: ir.Value, value: ir.Value) -> None:
        self.e.store(value, self.e.at(self.values, (vector, VECTOR_BYTES)))

    def _each_vector(self, body: Body, carried: Sequence[ir.Value] = ()) -> list[ir.Value]:
        """Emit `body` for the whole vectors of a row, and for the lanes that are left."""
        e, b = self.e, self.e.b
        whole = b.sdiv(self.a["width"], e.number(LANES))
        values = self._unrolled(whole, lambda index, sums: body(index, None, sums), carried)
        rest, before = b.sub(self.a["width"], b.mul(whole, e.number(LANES))), b.block
        with b.if_then(e.less(e.number(0), rest)):
            masked = body(whole, lanes_below(e, rest), values)
            inside = b.block
        results = [b.phi(value.type) for value in carried]
        for phi, value, longer in zip(results, values, masked, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(longer, inside)
        return results

    def _unrolled(
        self,
        count: ir.Value,
        body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
        carried: Sequence[ir.Value] = (),
    ) -> list[ir.Value]:
        """Emit `body` for vectors 0 to count - 1: UNROLL at a time, then one by one."""
        e, size = self.e, self.e.number(UNROLL)
        blocks = e.b.sdiv(count, size)
        with e.loop(blocks, carried) as block:
            first, values = e.b.mul(block.index, size), list(block.values)
            for i in range(UNROLL):
                values = body(e.b.add(first, e.number(i)), values)
            block.next_values = values
        done = e.b.mul(blocks, size)
        with e.loop(e.b.sub(count, done), block.values) as vector:
            vector.next_values = body(e.b.add(done, vector.index), list(vector.values))
        return list(vector.values)

    def _quantise_group(self, group: ir.Value, out: ir.Value, scales: ir.Value) -> ir.Value:
        """Write the codes and the scale of a group; returns the zero-point."""
        e, a = self.e, self.a
        first = e.b.mul(group, a["group_vectors"])
        count = e.minimum(a["group_vectors"], e.b.sub(self.vectors, first))
        values = e.at(self.values, (first, VECTOR_BYTES))
        scale, zero = self._scale(values, count)
        e.store(scale, e.at(scales, (group, 4)))
        inverse, zeros = e.splat(e.b.fdiv(ONE, scale)), e.splat(zero)
        codes = e.at(out, (first, LANES))

        def body(vector: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            value = e.load(VECTOR_F32, e.at(values, (vector, VECTOR_BYTES)))
            code = e.b.trunc(self._codes(e.b.fmul(value, inverse), zeros), VECTOR_I8)
            e.store(code, e.at(codes, (vector, LANES)), align=1)
            return []

        self._unrolled(count, body)
        return zero

    def _codes(self, scaled: ir.Value, zeros: ir.Value) -> ir.Value:
        """The codes of float32 lanes, in the lowest bytes of int32."""
        e, largest = self.e, LARGEST_CODE[self.variant.code]
        low, high = floats(-largest), floats(largest)
        if self.variant.code == "e4m3":
            return to_e4m3(e, clamp(e, scaled, low, high))
        if self.variant.symmetric:
            return low_bits(e, clamp(e, scaled, low, high))
        # The limits are whole numbers: cut before rounding, values cannot overflow.
        low, high = e.b.fsub(floats(-largest - 1), zeros), e.b.fsub(high, zeros)
        return e.b.add(low_bits(e, clamp(e, scaled, low, high)), to_integer(e, zeros))

    def _scale(self, values: ir.Value, count: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Scale and zero-point of `count` vectors: given, or made; NaN if a value is not finite."""
        e = self.e
        bits, high, low = self._range(values, count)
        scale, zero = self._dynamic(e.b.bitcast(bits, F32), high, low)
        scale = self._given("scale", scale)
        zero = zero if self.variant.symmetric else self._given("zero", zero)
        is_finite = e.b.icmp_signed("<", bits, ir.Constant(I32, INFINITY_BITS))
        return e.b.select(is_finite, scale, ir.Constant(F32, float("nan"))), zero

    def _range(self, values: ir.Value, count: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The bits of max |v|, above any number's if a value is NaN; max(v, 0) and min(v, 0)."""
        e, b = self.e, self.e.b
        starts = [e.words(0)] + ([] if self.variant.symmetric else [floats(0.0), floats(0.0)])

        def body(vector: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
            value = e.load(VECTOR_F32, e.at(values, (vector, VECTOR_BYTES)))
            magnitude = b.and_(bits_of(e, value), e.words(0x7FFFFFFF))
            largest = e.call("llvm.smax.v16i32", VECTOR_I32, magnitude, found[0])
            ends = zip("><", found[1:], strict=False)
            return [largest] + [
                b.select(b.fcmp_ordered(sign, value, end), value, end) for sign, end in ends
            ]

        found = self._unrolled(count, body, starts)
        largest = e.call("llvm.vector.reduce.smax.v16i32", I32, found[0])
        if self.variant.symmetric:
            return largest, ZERO, ZERO
        high = e.call("llvm.vector.reduce.fmax.v16f32", F32, found[1])
        return largest, high, e.call("llvm.vector.reduce.fmin.v16f32", F32, found[2])

    def _dynamic(
        self, largest: ir.Value, high: ir.Value, low: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Scale and zero-point that cover the range, cut to the bound."""
        e, b = self.e, self.e.b
        bound = b.bitcast(b.trunc(self.a["bound"], I32), F32)
        tiny = ir.Constant(F32, SMALLEST_SCALE)
        if self.variant.symmetric:
            levels = ir.Constant(F32, LARGEST_CODE[self.variant.code])
            return clamp(e, b.fdiv(clamp(e, largest, ZERO, bound), levels), tiny, LARGEST), ZERO
        high, low = clamp(e, high, ZERO, bound), clamp(e, low, b.fneg(bound), ZERO)
        scale = b.fdiv(b.fsub(high, low), ir.Constant(F32, 255.0))
        scale = clamp(e, scale, tiny, LARGEST)
        least, most, half = (ir.Constant(F32, value) for value in (-128.0, 127.0, ROUND_TO_INTEGER))
        zero = clamp(e, b.fsub(least, b.fmul(low, b.fdiv(ONE, scale))), least, most)
        return scale, b.fsub(b.fadd(zero, half), half)

    def _given(self, name: str, otherwise: ir.Value) -> ir.Value:
        """The static float32 at the address of field `name`, where there is one."""
        e, address = self.e, self.a[name]
        is_null = e.is_null(address)
        readable = e.b.select(is_null, e.args[0], address)
        return e.b.select(is_null, otherwise, e.load(F32, readable))

    def _finish(self, out: ir.Value, scales: ir.Value, zero: ir.Value) -> None:
        """Write the zero-point, and 0 in the padding after the codes and after the zero-point."""
        e, a = self.e, self.a
        with e.loop(e.b.sub(a["scales_at"], a["width"])) as byte:
            e.store(ir.Constant(I8, 0), e.at(out, (a["width"], 1), (byte.index, 1)), align=1)
        zero_at = e.at(scales, (a["groups"], 4))
        e.store(zero, zero_at)
        padding = e.b.sub(e.b.sub(e.at(out, (a["out_row"], 1)), zero_at), e.number(4))
        with e.loop(e.b.sdiv(padding, e.number(4))) as word:
            e.store(ir.Constant(I32, 0), e.at(zero_at, (word.index, 4)), 4)
