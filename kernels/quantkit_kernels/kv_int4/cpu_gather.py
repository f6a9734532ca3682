"""LLVM IR that reads keys and values back: dequantised, still rotated."""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import SIZE, Float, narrow, store_floats
from quantkit_kernels.cpu.ir import LANES
from quantkit_kernels.kv_int4.cpu_entry import Entry, decoded_one, divided, load_i32, nibbles
from quantkit_kernels.kv_int4.layout import CacheLayout

COUNTER = "next_task"

FIELDS = (
    COUNTER, "tasks", "task_tokens", "tokens", "heads", "start", "blocks", "cache", "cache_block",
    "cache_head", "keys", "keys_row", "keys_head", "values", "values_row", "values_head",
)  # fmt: skip
"""The int64 argument block: addresses, strides in bytes, and counts."""


@dataclass(frozen=True)
class GatherVariant:
    """What a kernel is generated for.

    Attributes:
        layout: of the cache; values are rows.
        keys, values: dtypes of what is written.
    """

    layout: CacheLayout
    keys: Float
    values: Float


def build_module(variant: GatherVariant) -> ir.Module:
    """The module whose `gather(arguments)` reads blocks of tokens until none is left."""
    module = ir.Module()
    _Gatherer(module, variant).emit()
    return module


class _Gatherer:
    """Emits `gather`."""

    def __init__(self, module: ir.Module, variant: GatherVariant) -> None:
        self.entry, self.variant = Entry(module, "gather", FIELDS, (COUNTER,)), variant
        self.layout = variant.layout
        self.e, self.a = self.entry.e, self.entry.a

    def emit(self) -> None:
        """A task is `task_tokens` tokens of one head, whose codes lie behind each other."""
        e, a, layout = self.e, self.a, self.layout
        with self.entry.tasks(COUNTER, e.b.mul(a["tasks"], a["heads"])) as task:
            piece, head = divided(e, task, a["heads"])
            first = e.b.mul(piece, a["task_tokens"])
            count = e.minimum(a["task_tokens"], e.b.sub(a["tokens"], first))
            with e.loop(count) as token:
                row = e.b.add(first, token.index)
                column, place = divided(e, e.b.add(a["start"], row), layout.block_size)
                block = load_i32(e, e.at(a["blocks"], (column, 4)))
                base = e.at(a["cache"], (block, a["cache_block"]), (head, a["cache_head"]))
                self._keys(base, place, row, head)
                self._values(base, place, row, head)

    def _keys(self, base: ir.Value, token: ir.Value, row: ir.Value, head: ir.Value) -> None:
        e, a, layout = self.e, self.a, self.layout
        words = e.at(base, (e.number(layout.key_words_at), 1), (token, 2))
        target = e.at(a["keys"], (row, a["keys_row"]), (head, a["keys_head"]))
        codes = e.at(base, (token, layout.half))
        self._copy(codes, words, layout.key_dimensions, self.variant.keys, target)

    def _values(self, base: ir.Value, token: ir.Value, row: ir.Value, head: ir.Value) -> None:
        e, a, layout = self.e, self.a, self.layout
        words = e.at(base, (e.number(layout.value_words_at), 1), (token, 2))
        target = e.at(a["values"], (row, a["values_row"]), (head, a["values_head"]))
        codes = e.at(base, (e.number(layout.value_codes_at), 1), (token, layout.half))
        self._copy(codes, words, layout.value_dimensions, self.variant.values, target)

    def _copy(
        self, codes: ir.Value, words: ir.Value, group: int, kind: Float, target: ir.Value
    ) -> None:
        """target = (code - zero) * scale."""
        e, layout = self.e, self.layout
        pairs = [
            decoded_one(e, e.b.add(words, e.number(2 * layout.block_size * i)))
            for i in range(layout.padded_size // group)
        ]
        for byte in range(0, layout.half, LANES):
            both = nibbles(e, e.b.add(codes, e.number(byte)))
            for number, dimension in zip(both, (byte, byte + layout.half), strict=True):
                scale, zero = pairs[dimension // group]
                value = e.b.fmul(e.b.fsub(number, zero), scale)
                place = e.b.add(target, e.number(SIZE[kind] * dimension))
                store_floats(e, kind, narrow(e, kind, value), place)
