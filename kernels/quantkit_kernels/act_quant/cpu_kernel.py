"""LLVM IR of the CPU kernel: values of a row in float32 in cache, then its scales, then its codes.

A thread draws blocks of rows until none is left. It writes what is to be quantised (x, its norm, or
silu(gate) * up) to a float32 row on its stack, which stays in the first-level cache, and reads it
twice: for the range of each group, and for the codes. Sums read the codes again, a byte each.
"""

from __future__ import annotations

import torch
from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import (
    ROUND_TO_INTEGER,
    bits_of,
    clamp,
    floats,
    low_bits,
    to_e4m3,
    to_integer,
)
from quantkit_kernels.act_quant.cpu_values import VECTOR_BYTES, Values, Variant, unrolled
from quantkit_kernels.act_quant.reference import SMALLEST_SCALE
from quantkit_kernels.act_quant.rows import LARGEST_CODE
from quantkit_kernels.cpu.ir import (
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
    "out", "out_row", "scales_at", "sums", "sum_vectors",
)  # fmt: skip
"""The int64 argument block: addresses, strides in bytes, and counts.

width: K. epsilon, bound: the bits of a float32. scale, zero: addresses of float32, null for dynamic
ones. group_vectors, sum_vectors: vectors of 16 in a group of a scale, or of a sum.
"""

INFINITY_BITS = 0x7F800000
ZERO, ONE, LARGEST = (ir.Constant(F32, value) for value in (0.0, 1.0, torch.finfo().max))


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
        self.stack = e.b.ptrtoint(e.b.alloca(VECTOR_F32, self.vectors), I64)
        self.values = Values(e, variant, self.a, self.stack)

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
        self.values.fill(row)
        out = e.at(a["out"], (row, a["out_row"]))
        scales = e.b.add(out, a["scales_at"])
        with e.loop(a["groups"], [ZERO]) as group:
            zero = self._quantise_group(group.index, out, scales)
            group.next_values = [zero]
        self._finish(out, scales, group.values[0])
        if self.variant.code == "int8":
            self._sum(out, e.at(scales, (a["groups"], 4), (e.number(4), 1)))

    def _quantise_group(self, group: ir.Value, out: ir.Value, scales: ir.Value) -> ir.Value:
        """Write the codes and the scale of a group; returns the zero-point."""
        e, a = self.e, self.a
        first = e.b.mul(group, a["group_vectors"])
        count = e.minimum(a["group_vectors"], e.b.sub(self.vectors, first))
        values = e.at(self.stack, (first, VECTOR_BYTES))
        scale, zero = self._scale(values, count)
        e.store(scale, e.at(scales, (group, 4)))
        inverse, zeros = e.splat(e.b.fdiv(ONE, scale)), e.splat(zero)
        codes = e.at(out, (first, LANES))

        def body(vector: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            value = e.load(VECTOR_F32, e.at(values, (vector, VECTOR_BYTES)))
            code = e.b.trunc(self._codes(e.b.fmul(value, inverse), zeros), VECTOR_I8)
            e.store(code, e.at(codes, (vector, LANES)), align=1)
            return []

        unrolled(e, count, body)
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

        found = unrolled(e, count, body, starts)
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

    def _sum(self, codes: ir.Value, sums: ir.Value) -> None:
        """Write the sums of codes, which are followed by zeros up to a whole vector."""
        e, a = self.e, self.a
        nothing = ir.Constant(VECTOR_I32, None)
        with e.loop(a["sums"]) as group:
            first = e.b.mul(group.index, a["sum_vectors"])
            count = e.minimum(a["sum_vectors"], e.b.sub(self.vectors, first))
            start = e.at(codes, (first, LANES))

            def body(vector: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
                loaded = e.load(VECTOR_I8, e.at(start, (vector, LANES)), align=1)
                return [e.b.add(total[0], e.b.sext(loaded, VECTOR_I32))]

            (total,) = unrolled(e, count, body, [nothing])
            e.store(
                e.call("llvm.vector.reduce.add.v16i32", I32, total), e.at(sums, (group.index, 4))
            )

    def _given(self, name: str, otherwise: ir.Value) -> ir.Value:
        """The static float32 at the address of field `name`, where there is one."""
        e, address = self.e, self.a[name]
        is_null = e.is_null(address)
        readable = e.b.select(is_null, e.args[0], address)
        return e.b.select(is_null, otherwise, e.load(F32, readable))

    def _finish(self, out: ir.Value, scales: ir.Value, zero: ir.Value) -> None:
        """Write the zero-point, and 0 in the padding after the codes and up to the row's end."""
        e, a = self.e, self.a
        with e.loop(e.b.sub(a["scales_at"], a["width"])) as byte:
            e.store(ir.Constant(I8, 0), e.at(out, (a["width"], 1), (byte.index, 1)), align=1)
        zero_at = e.at(scales, (a["groups"], 4))
        e.store(zero, zero_at)
        padding = e.b.sub(e.b.sub(e.at(out, (a["out_row"], 1)), zero_at), e.number(4))
        with e.loop(e.b.sdiv(padding, e.number(4))) as word:
            e.store(ir.Constant(I32, 0), e.at(zero_at, (word.index, 4)), 4)
