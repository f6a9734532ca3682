"""The argument block of attention on the CPU, and what entries read of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llvmlite import ir

from quantkit_kernels.cpu.ir import Emitter
from quantkit_kernels.kv_int4.cpu_entry import ceiling, load_i32
from quantkit_kernels.kv_int4.cpu_variant import SPLIT_TOKENS, TOKENS, AttendVariant

COUNTERS = ("next_slot", "next_task")
"""The fields that threads draw memory for queries and tasks from."""

FIELDS = (
    *COUNTERS, "requests", "heads", "splits", "query", "query_row", "query_head", "out", "out_row",
    "out_head", "cache", "cache_block", "cache_head", "table", "back_table", "block_table",
    "block_table_row", "seq_lens", "query_start", "max_query_len", "max_seq_len", "window",
    "factor", "softcap", "shift", "scale", "sinks", "rows", "finished", "queries", "partials",
)  # fmt: skip
"""The int64 argument block: addresses, strides in bytes, and counts.

heads: of keys. splits: of `max_seq_len`. table, back_table: of the rotation. window: 0 for none.
factor, softcap: the bits of float32; logits are counted in powers of two, so one of the two has
log2(e) in it. rows: of queries a KV head, at most, a multiple of the variant's. finished:
int64 [requests, heads], 0, counts splits. queries: prepared rows [threads, rows]. partials:
[requests, heads, splits, rows].
"""


@dataclass(frozen=True)
class Request:
    """One request, in int64 values; those without tokens or queries have no rows.

    Attributes:
        begin: the row of its first query.
        length: its tokens.
        rows: its queries times query heads of a KV head.
        padded_rows: rows up to a multiple of the variant's.
        position: of its first query.
    """

    e: Emitter
    a: Mapping[str, ir.Value]
    variant: AttendVariant
    begin: ir.Value
    length: ir.Value
    rows: ir.Value
    padded_rows: ir.Value
    position: ir.Value

    @classmethod
    def load(
        cls, e: Emitter, a: Mapping[str, ir.Value], index: ir.Value, variant: AttendVariant
    ) -> Request:
        """Read the batch's tensors; more queries or tokens than announced are not read."""
        start = e.at(a["query_start"], (index, 4))
        begin, zero = load_i32(e, start), e.number(0)
        length = load_i32(e, e.at(a["seq_lens"], (index, 4)))
        length = e.maximum(e.minimum(length, a["max_seq_len"]), zero)
        queries = e.minimum(e.b.sub(load_i32(e, start, 4), begin), a["max_query_len"])
        is_padding = e.b.icmp_signed("==", length, zero)
        queries = e.b.select(is_padding, zero, e.maximum(queries, zero))
        rows = e.b.mul(queries, e.number(variant.group))
        padded = e.b.mul(ceiling(e, rows, variant.rows), e.number(variant.rows))
        return cls(e, a, variant, begin, length, rows, padded, e.b.sub(length, queries))

    def lowest(self, position: ir.Value) -> ir.Value:
        """The first position that a query at `position` sees."""
        e, window = self.e, self.a["window"]
        first = e.b.add(e.b.sub(position, window), e.number(1))
        return e.b.select(e.is_null(window), e.number(0), e.maximum(first, e.number(0)))

    @property
    def first(self) -> ir.Value:
        """The first position that any query sees, or one up to 15 before, in the same block."""
        return self.e.b.and_(self.lowest(self.position), self.e.number(-TOKENS))

    @property
    def first_split(self) -> ir.Value:
        """The first split that holds a position that is seen."""
        return self.e.b.udiv(self.first, self.e.number(SPLIT_TOKENS))

    @property
    def splits(self) -> ir.Value:
        """Splits that hold positions that are seen."""
        return self.e.b.sub(ceiling(self.e, self.length, SPLIT_TOKENS), self.first_split)

    def partial(self, pair: ir.Value, split: ir.Value, index: ir.Value) -> ir.Value:
        """The address of a row's sums over a split; `pair` counts requests and heads."""
        e, a = self.e, self.a
        place = e.b.add(e.b.mul(pair, a["splits"]), split)
        row = e.b.add(e.b.mul(place, a["rows"]), index)
        return e.at(a["partials"], (row, self.variant.partial_bytes))
