"""LLVM IR that merges splits and turns results back."""

from __future__ import annotations

import math

from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import floats
from quantkit_kernels.cpu.ir import VECTOR_F32
from quantkit_kernels.kv_int4.cpu_entry import (
    VECTOR_BYTES,
    Entry,
    broadcast,
    divided,
    exp2,
    larger,
    stack,
)
from quantkit_kernels.kv_int4.cpu_request import COUNTERS, FIELDS, Request
from quantkit_kernels.kv_int4.cpu_rotate import unrotated
from quantkit_kernels.kv_int4.cpu_rows import store_head
from quantkit_kernels.kv_int4.cpu_softmax import LOWEST
from quantkit_kernels.kv_int4.cpu_variant import AttendVariant, Partial


def build_results(module: ir.Module, variant: AttendVariant) -> ir.Function:
    """results(arguments, request, head): o = o' R^T of all rows, splits merged."""
    results = _Results(module, variant)
    results.emit()
    return results.e.function


class _Results:
    def __init__(self, module: ir.Module, variant: AttendVariant) -> None:
        entry, self.variant = Entry(module, "results", FIELDS, COUNTERS, 3), variant
        self.e, self.a = entry.e, entry.a
        self.memory = stack(self.e, 4 * variant.padded)

    def emit(self) -> None:
        e, a = self.e, self.a
        _, index, head = e.args
        request = Request.load(e, a, index, self.variant)
        pair = e.at(head, (index, a["heads"]))
        with e.loop(request.rows) as row:
            self._row(request, pair, head, row.index)
        e.b.ret_void()

    def _row(self, request: Request, pair: ir.Value, head: ir.Value, row: ir.Value) -> None:
        e, b, a, variant = self.e, self.e.b, self.a, self.variant
        token, member = divided(e, row, variant.group)
        query_head = b.add(b.mul(head, e.number(variant.group)), member)
        merged = self._merged(request, pair, row, query_head)
        vectors = unrotated(e, merged, a["back_table"], self.memory)
        target = e.at(a["out"], (b.add(request.begin, token), a["out_row"]),
                      (query_head, a["out_head"]))  # fmt: skip
        store_head(e, variant.kind, vectors, target, variant.layout.head_size)

    def _merged(
        self, request: Request, pair: ir.Value, row: ir.Value, query_head: ir.Value
    ) -> list[ir.Value]:
        """o' = sum_s 2^(m_s - m) sums_s / sum_s 2^(m_s - m) total_s."""
        e, b, at = self.e, self.e.b, 4 * self.variant.padded
        first, count = request.first_split, request.splits
        sink = self._sink(query_head)
        with e.loop(count, [sink]) as split:
            partial = request.partial(pair, b.add(first, split.index), row)
            maximum = broadcast(e, partial, at + Partial.MAXIMUM)
            split.next_values = [larger(e, maximum, split.values[0])]
        highest = split.values[0]
        vectors = [floats(0.0)] * (self.variant.padded * 4 // VECTOR_BYTES)
        total = exp2(e, b.fsub(sink, highest)) if self.variant.sinks else floats(0.0)
        with e.loop(count, [total, *vectors]) as split:
            partial = request.partial(pair, b.add(first, split.index), row)
            weight = exp2(e, b.fsub(broadcast(e, partial, at + Partial.MAXIMUM), highest))
            sums = [e.load(VECTOR_F32, partial, VECTOR_BYTES * i) for i in range(len(vectors))]
            sums = [broadcast(e, partial, at + Partial.TOTAL), *sums]
            split.next_values = [
                e.fma(weight, value, before)
                for value, before in zip(sums, split.values, strict=True)
            ]
        total, *vectors = split.values
        return [b.fdiv(vector, total) for vector in vectors]

    def _sink(self, query_head: ir.Value) -> ir.Value:
        """The head's logit without a value, times log2(e)."""
        if not self.variant.sinks:
            return floats(LOWEST)
        e = self.e
        sink = broadcast(e, e.at(self.a["sinks"], (query_head, 4)))
        return e.b.fmul(sink, floats(math.log2(math.e)))
