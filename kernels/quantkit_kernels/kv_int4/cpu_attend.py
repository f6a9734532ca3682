"""LLVM IR of attention over the cache.

A task is a request, a KV head and `SPLIT_TOKENS` tokens. Tile by tile, all its queries meet the
same tokens, so that codes come from memory once. Who finishes the last split of a request and head
merges all of them: threads never wait for each other. Flash-Decoding's splits and the merge of
their maxima and sums: https://crfm.stanford.edu/2023/10/12/flashdecoding.html
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import floats
from quantkit_kernels.cpu.ir import F32, I64
from quantkit_kernels.kv_int4.cpu_entry import (
    VECTOR_BYTES,
    Entry,
    ceiling,
    divided,
    load_i32,
    stack,
)
from quantkit_kernels.kv_int4.cpu_keys import build_keys
from quantkit_kernels.kv_int4.cpu_queries import build_queries
from quantkit_kernels.kv_int4.cpu_request import COUNTERS, FIELDS, Request
from quantkit_kernels.kv_int4.cpu_results import build_results
from quantkit_kernels.kv_int4.cpu_softmax import LOWEST, build_scales, build_softmax
from quantkit_kernels.kv_int4.cpu_values import build_values
from quantkit_kernels.kv_int4.cpu_variant import (
    BASE_BYTES,
    PIECE_BYTES,
    ROW_FIELDS,
    SPLIT_TOKENS,
    TILE,
    TILE_BYTES,
    TOKENS,
    AttendVariant,
    Frame,
    Partial,
)

ENTRIES = ("attend",)


def build_module(variant: AttendVariant) -> ir.Module:
    """The module whose `attend(arguments)` computes tasks until none is left."""
    module = ir.Module()
    _Attend(module, variant).emit()
    return module


class _Place(NamedTuple):
    """A task: a request, a KV head, the number of the pair, and a split."""

    request: ir.Value
    head: ir.Value
    pair: ir.Value
    split: ir.Value


class _Attend:
    """Emits `attend`."""

    def __init__(self, module: ir.Module, variant: AttendVariant) -> None:
        self.keys, self.scales = build_keys(module, variant), build_scales(module, variant)
        self.softmax, self.values = build_softmax(module, variant), build_values(module, variant)
        self.queries, self.results = build_queries(module, variant), build_results(module, variant)
        self.entry, self.variant = Entry(module, "attend", FIELDS, COUNTERS), variant
        self.e, self.a = self.entry.e, self.entry.a
        self.frame = Frame(variant)
        self.memory = stack(self.e, self.frame.size)

    def emit(self) -> None:
        """while (task = next_task++) < tasks: compute it; merge after the last of its pair."""
        e, b, a = self.e, self.e.b, self.a
        slot = b.mul(self.entry.draw("next_slot"), a["rows"])
        self.rows = e.at(a["queries"], (slot, self.variant.row_bytes))
        pairs = b.mul(a["requests"], a["heads"])
        with self.entry.tasks("next_task", b.mul(pairs, a["splits"])) as task:
            pair, split = divided(e, task, a["splits"])
            index, head = divided(e, pair, a["heads"])
            request = Request.load(e, a, index, self.variant)
            start = b.mul(split, e.number(SPLIT_TOKENS))
            stop = e.minimum(request.length, b.add(start, e.number(SPLIT_TOKENS)))
            start = e.maximum(start, request.first)
            has_work = b.and_(e.less(start, stop), e.less(e.number(0), request.rows))
            with b.if_then(has_work):
                b.call(self.queries, [e.args[0], index, head, self.rows])
                self._split(request, _Place(index, head, pair, split), start, stop)
                with b.if_then(self._is_last(request, pair)):
                    b.call(self.results, [e.args[0], index, head])

    def _is_last(self, request: Request, pair: ir.Value) -> ir.Value:
        """Count a finished split; the others of its pair are, and what they wrote can be read."""
        e, b = self.e, self.e.b
        address = e.at(self.a["finished"], (pair, 8))
        pointer = b.inttoptr(address, I64.as_pointer())
        before = b.atomic_rmw("add", pointer, e.number(1), "acq_rel")
        return b.icmp_signed("==", before, b.sub(request.splits, e.number(1)))

    def _split(self, request: Request, place: _Place, start: ir.Value, stop: ir.Value) -> None:
        """Positions start to stop, tile by tile: each row's maximum, total and sums."""
        e, b, frame = self.e, self.e.b, self.frame
        self._clear(request, place)
        groups = ceiling(e, b.sub(stop, start), TOKENS)
        self._find(place, start, groups)
        with e.loop(ceiling(e, groups, TILE)) as tile:
            done = b.mul(tile.index, e.number(TILE))
            count = e.minimum(e.number(TILE), b.sub(groups, done))
            bases = e.at(self._at(frame.bases), (done, BASE_BYTES))
            b.call(self.scales, [bases, count, self._at(frame.scales)])
            self._tile(request, place, bases, e.at(start, (done, TOKENS)), count)

    def _clear(self, request: Request, place: _Place) -> None:
        e, at = self.e, 4 * self.variant.padded
        with e.loop(request.padded_rows) as row:
            target = request.partial(place.pair, place.split, row.index)
            for offset in range(0, at, VECTOR_BYTES):
                e.store(floats(0.0), target, offset)
            e.store(ir.Constant(F32, LOWEST), target, at + Partial.MAXIMUM)
            e.store(ir.Constant(F32, 0.0), target, at + Partial.TOTAL)

    def _find(self, place: _Place, start: ir.Value, count: ir.Value) -> None:
        """Look up the blocks of a split's tokens, and of a tile behind it: those of its last."""
        e, a, bases = self.e, self.a, self._at(self.frame.bases)
        blocks = e.at(a["block_table"], (place.request, a["block_table_row"]))
        with e.loop(e.b.add(count, e.number(TILE))) as group:
            last = e.minimum(group.index, e.b.sub(count, e.number(1)))
            column, token = divided(e, e.at(start, (last, TOKENS)), self.variant.layout.block_size)
            block = load_i32(e, e.at(blocks, (column, 4)))
            base = e.at(a["cache"], (block, a["cache_block"]), (place.head, a["cache_head"]))
            entry = e.at(bases, (group.index, BASE_BYTES))
            e.store(base, entry, 0, align=8)
            e.store(token, entry, 8, align=8)

    def _tile(
        self,
        request: Request,
        place: _Place,
        bases: ir.Value,
        position: ir.Value,
        count: ir.Value,
    ) -> None:
        """All rows of queries, `rows` at a time, on one tile."""
        e, b, variant, frame = self.e, self.e.b, self.variant, self.frame
        scales, logits, weights, numbers, corrections, decays = (
            self._at(offset)
            for offset in (
                frame.scales, frame.logits, frame.weights, frame.numbers, frame.corrections,
                frame.decay,
            )
        )  # fmt: skip
        with e.loop(b.udiv(request.padded_rows, e.number(variant.rows))) as block:
            first = b.mul(block.index, e.number(variant.rows))
            queries = e.at(self.rows, (first, variant.row_bytes))
            partials = request.partial(place.pair, place.split, first)
            b.call(self.keys, [queries, bases, count, logits])
            with e.loop(e.number(variant.rows)) as row:
                i, planes = row.index, variant.layout.value_groups
                b.call(
                    self.softmax,
                    [
                        e.at(queries, (i, variant.row_bytes)),
                        e.at(logits, (i, TILE_BYTES)),
                        e.at(weights, (i, TILE_BYTES * planes)),
                        e.at(numbers, (i, 2 * PIECE_BYTES * planes)),
                        e.at(corrections, (i, ROW_FIELDS)),
                        e.at(decays, (i, 4)),
                        count,
                        position,
                        e.at(partials, (i, variant.partial_bytes)),
                        scales,
                    ],
                )
            given = numbers if variant.integers else weights
            b.call(self.values, [bases, count, given, corrections, decays, partials])

    def _at(self, offset: int) -> ir.Value:
        return self.e.b.add(self.memory, self.e.number(offset))
