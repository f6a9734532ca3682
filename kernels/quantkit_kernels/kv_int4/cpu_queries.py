"""LLVM IR that prepares queries: rotated, in float32 or in two bytes, with what they see."""

from __future__ import annotations

import functools

from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import floats, to_integer
from quantkit_kernels.cpu.ir import F32, I32, LANES, VECTOR_F32, VECTOR_I8
from quantkit_kernels.kv_int4.cpu_entry import (
    VECTOR_BYTES,
    Entry,
    divided,
    first_lane,
    folded,
    larger,
    stack,
)
from quantkit_kernels.kv_int4.cpu_request import COUNTERS, FIELDS, Request
from quantkit_kernels.kv_int4.cpu_rotate import Vectors, rotated
from quantkit_kernels.kv_int4.cpu_rows import load_head
from quantkit_kernels.kv_int4.cpu_variant import AttendVariant, Row

LARGEST = 127 * 256 + 127
"""The largest number of two signed bytes, 256 high + low."""

TINY = 1e-30
"""What a query of zeros is divided by."""


def build_queries(module: ir.Module, variant: AttendVariant) -> ir.Function:
    """queries(arguments, request, head, target): rows of a request and a KV head, prepared."""
    queries = _Queries(module, variant)
    queries.emit()
    return queries.e.function


class _Queries:
    def __init__(self, module: ir.Module, variant: AttendVariant) -> None:
        entry, self.variant = Entry(module, "queries", FIELDS, COUNTERS, 4), variant
        self.e, self.a = entry.e, entry.a
        self.memory = stack(self.e, 4 * variant.padded)

    def emit(self) -> None:
        """Rows of queries, and rows of zeros up to a multiple of `rows`."""
        e, variant = self.e, self.variant
        _, index, head, first = e.args
        request = Request.load(e, self.a, index, variant)
        with e.loop(request.padded_rows) as row:
            target = e.at(first, (row.index, variant.row_bytes))
            with e.b.if_else(e.less(row.index, request.rows)) as (given, padding):
                with given:
                    self._prepare(request, head, row.index, target)
                with padding:
                    for offset in range(0, variant.row_bytes, VECTOR_BYTES):
                        e.store(floats(0.0), target, offset)
        e.b.ret_void()

    def _prepare(self, request: Request, head: ir.Value, row: ir.Value, target: ir.Value) -> None:
        e, b, a, variant = self.e, self.e.b, self.a, self.variant
        token, member = divided(e, row, variant.group)
        query_head = b.add(b.mul(head, e.number(variant.group)), member)
        source = e.at(a["query"], (b.add(request.begin, token), a["query_row"]),
                      (query_head, a["query_head"]))  # fmt: skip
        layout = variant.layout
        vectors = load_head(e, variant.kind, source, layout.head_size, layout.padded_size)
        factor = b.bitcast(b.trunc(a["factor"], I32), F32)
        extra = self._extra(vectors, head)
        if variant.scale:
            vectors = self._times("scale", vectors, head)
        vectors = rotated(e, vectors, a["table"], self.memory)
        store = self._store_integers if variant.integers else self._store_floats
        step = store(vectors, target)
        at = variant.fields_at
        e.store(b.fmul(factor, step), target, at + Row.FACTOR)
        e.store(b.fmul(factor, extra), target, at + Row.EXTRA)
        e.store(b.bitcast(b.trunc(a["softcap"], I32), F32), target, at + Row.SOFTCAP)
        position = b.add(request.position, token)
        first = request.lowest(position)
        e.store(b.trunc(first, I32), target, at + Row.FIRST)
        e.store(b.trunc(b.add(position, e.number(1)), I32), target, at + Row.STOP)

    def _times(self, name: str, vectors: Vectors, head: ir.Value) -> Vectors:
        layout = self.variant.layout
        address = self.e.at(self.a[name], (head, 4 * layout.head_size))
        numbers = load_head(self.e, "f32", address, layout.head_size, layout.padded_size)
        return [self.e.b.fmul(x, y) for x, y in zip(vectors, numbers, strict=True)]

    def _extra(self, vectors: Vectors, head: ir.Value) -> ir.Value:
        """q . mu."""
        if not self.variant.shift:
            return ir.Constant(F32, 0.0)
        products = self._times("shift", vectors, head)
        return self._sum(products)

    def _sum(self, vectors: Vectors) -> ir.Value:
        e = self.e
        return first_lane(e, folded(e, functools.reduce(e.b.fadd, vectors), e.b.fadd))

    def _store_floats(self, vectors: Vectors, target: ir.Value) -> ir.Value:
        for i, vector in enumerate(vectors):
            self.e.store(vector, target, VECTOR_BYTES * i)
        self._store_sums(vectors, target)
        return ir.Constant(F32, 1.0)

    def _store_integers(self, vectors: Vectors, target: ir.Value) -> ir.Value:
        """Write q' / step in two bytes, and return step; NaN where q' is not finite."""
        e, b = self.e, self.e.b
        highest, finite = floats(0.0), None
        for vector in vectors:
            magnitude = e.call("llvm.fabs.v16f32", VECTOR_F32, vector)
            highest = larger(e, magnitude, highest)
            is_number = b.fcmp_ordered("<", magnitude, floats(float("inf")))
            finite = is_number if finite is None else b.and_(finite, is_number)
        highest = larger(e, folded(e, highest, lambda x, y: larger(e, x, y)), floats(TINY))
        step = b.fdiv(highest, floats(float(LARGEST)))
        inverse = b.fdiv(floats(1.0), step)
        numbers = []
        for i, vector in enumerate(vectors):
            number = to_integer(e, b.fmul(vector, inverse))
            high = b.ashr(b.add(number, e.words(128)), e.words(8))
            e.store(b.trunc(high, VECTOR_I8), target, LANES * i, align=1)
            e.store(b.trunc(number, VECTOR_I8), target, self.variant.padded + LANES * i, align=1)
            numbers.append(b.sitofp(number, VECTOR_F32))
        self._store_sums(numbers, target)
        lanes = ir.IntType(LANES)
        all_finite = b.icmp_unsigned("==", b.bitcast(finite, lanes), ir.Constant(lanes, -1))
        return b.select(all_finite, first_lane(e, step), ir.Constant(F32, float("nan")))

    def _store_sums(self, vectors: Vectors, target: ir.Value) -> None:
        """The sums of units of dimensions."""
        count = self.variant.unit // LANES
        for i in range(self.variant.units):
            total = self._sum(vectors[count * i :][:count])
            self.e.store(total, target, self.variant.sums_at + 4 * i)
