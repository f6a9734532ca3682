"""LLVM IR that writes a row's values, in float32, to cache: x, its norm, or silu(gate) * up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import (
    SIZE,
    Float,
    floats,
    lanes_below,
    load_floats,
    narrow,
    silu,
    store_floats,
    widen,
)
from quantkit_kernels.act_quant.rows import RowCode
from quantkit_kernels.act_quant.source import Kind
from quantkit_kernels.cpu.ir import F32, I32, LANES, VECTOR_F32, Emitter

VECTOR_BYTES = 4 * LANES
"""Bytes of a vector of float32."""

UNROLL = 4
"""Vectors in an iteration of a loop."""

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


def unrolled(
    e: Emitter,
    count: ir.Value,
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
    carried: Sequence[ir.Value] = (),
) -> list[ir.Value]:
    """Emit `body` for vectors 0 to count - 1: UNROLL at a time, then one by one."""
    size = e.number(UNROLL)
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


class Values:
    """Emits what fills the row of float32 at `address`; `a` holds the kernel's arguments."""

    def __init__(
        self, e: Emitter, variant: Variant, a: Mapping[str, ir.Value], address: ir.Value
    ) -> None:
        self.e, self.variant, self.a, self.address = e, variant, a, address

    def fill(self, row: ir.Value) -> None:
        """Write the values of a row, and 0 up to the end of its last vector."""
        x = self.e.at(self.a["x"], (row, self.a["x_row"]))
        if self.variant.source == "x":
            self._copy(x)
        elif self.variant.source == "silu_mul":
            self._gate(x)
        else:
            self._norm(x, row)

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
            "llvm.vector.reduce.fadd.v16f32",
            F32,
            ir.Constant(F32, 0.0),
            functools.reduce(e.b.fadd, sums),
        )
        mean = e.b.fdiv(total, e.b.sitofp(a["width"], F32))
        epsilon = e.b.bitcast(e.b.trunc(a["epsilon"], I32), F32)
        root = e.call("llvm.sqrt.f32", F32, e.b.fadd(mean, epsilon))
        factor = e.splat(e.b.fdiv(ir.Constant(F32, 1.0), root))

        def scale(vector: ir.Value, mask: ir.Value | None, _: list[ir.Value]) -> list[ir.Value]:
            weight = self._get(self.variant.weight, a["weight"], vector, mask)
            value = e.load(VECTOR_F32, e.at(self.address, (vector, VECTOR_BYTES)))
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
        self.e.store(value, self.e.at(self.address, (vector, VECTOR_BYTES)))

    def _each_vector(self, body: Body, carried: Sequence[ir.Value] = ()) -> list[ir.Value]:
        """Emit `body` for the whole vectors of a row, and for the lanes that are left."""
        e, b = self.e, self.e.b
        whole = b.sdiv(self.a["width"], e.number(LANES))
        values = unrolled(e, whole, lambda index, sums: body(index, None, sums), carried)
        rest, before = b.sub(self.a["width"], b.mul(whole, e.number(LANES))), b.block
        with b.if_then(e.less(e.number(0), rest)):
            masked = body(whole, lanes_below(e, rest), values)
            inside = b.block
        results = [b.phi(value.type) for value in carried]
        for phi, value, longer in zip(results, values, masked, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(longer, inside)
        return results
