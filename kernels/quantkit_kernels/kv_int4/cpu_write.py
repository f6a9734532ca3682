"""LLVM IR that writes keys and values to the cache: rotated and quantised in registers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import (
    ROUND_TO_INTEGER,
    Float,
    bits_of,
    floats,
    to_integer,
)
from quantkit_kernels.cpu.ir import I16, I32, I64, LANES, VECTOR_F32, VECTOR_I8, VECTOR_I32, Emitter
from quantkit_kernels.kv_int4.cpu_entry import (
    Entry,
    divided,
    first_lane,
    folded,
    larger,
    smaller,
    stack,
)
from quantkit_kernels.kv_int4.cpu_rotate import Vectors, rotated
from quantkit_kernels.kv_int4.cpu_rows import load_head, within_head
from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.reference import (
    DROPPED_BITS,
    LARGEST_CODE,
    LARGEST_SCALE,
    NAN_WORD,
    SCALES,
    SMALLEST_SCALE,
)

COUNTER = "next_task"

FIELDS = (
    COUNTER, "tasks", "task_tokens", "tokens", "heads", "slots", "key", "key_row", "key_head",
    "value", "value_row", "value_head", "cache", "cache_block", "cache_head", "shift", "scale",
    "table",
)  # fmt: skip
"""The int64 argument block: addresses, strides in bytes, and counts."""


@dataclass(frozen=True)
class WriteVariant:
    """What a kernel is generated for.

    Attributes:
        layout: of the cache; values are rows.
        kind: dtype of keys and values.
        shift, scale: keys have them.
    """

    layout: CacheLayout
    kind: Float
    shift: bool
    scale: bool


def build_module(variant: WriteVariant) -> ir.Module:
    """The module whose `write(arguments)` writes blocks of tokens until none is left."""
    module = ir.Module()
    _Writer(module, variant).emit()
    return module


class _Writer:
    """Emits `write`."""

    def __init__(self, module: ir.Module, variant: WriteVariant) -> None:
        self.entry, self.variant = Entry(module, "write", FIELDS, (COUNTER,)), variant
        self.layout = variant.layout
        self.e, self.a = self.entry.e, self.entry.a
        self.memory = stack(self.e, 4 * self.layout.padded_size)

    def emit(self) -> None:
        """Each task is `task_tokens` tokens with all their heads."""
        e, a = self.e, self.a
        with self.entry.tasks(COUNTER, a["tasks"]) as task:
            first = e.b.mul(task, a["task_tokens"])
            count = e.minimum(a["task_tokens"], e.b.sub(a["tokens"], first))
            with e.loop(count) as token:
                row = e.b.add(first, token.index)
                slot = e.load(I64, e.at(a["slots"], (row, 8)), align=8)
                with e.b.if_then(e.b.icmp_signed(">=", slot, e.number(0))):
                    self._token(row, slot)

    def _token(self, row: ir.Value, slot: ir.Value) -> None:
        e, a, layout = self.e, self.a, self.layout
        block, token = divided(e, slot, layout.block_size)
        with e.loop(a["heads"]) as head:
            base = e.at(a["cache"], (block, a["cache_block"]), (head.index, a["cache_head"]))
            codes = e.at(base, (token, layout.half))
            key = e.at(a["key"], (row, a["key_row"]), (head.index, a["key_head"]))
            words = e.at(base, (e.number(layout.key_words_at), 1), (token, 2))
            self._write(self._key(key, head.index), layout.key_dimensions, codes, words)
            value = e.at(a["value"], (row, a["value_row"]), (head.index, a["value_head"]))
            words = e.at(base, (e.number(layout.value_words_at), 1), (token, 2))
            codes = e.at(codes, (e.number(layout.value_codes_at), 1))
            self._write(self._load(value), layout.value_dimensions, codes, words)

    def _load(self, address: ir.Value, kind: Float | None = None) -> Vectors:
        layout = self.layout
        kind = kind or self.variant.kind
        return load_head(self.e, kind, address, layout.head_size, layout.padded_size)

    def _key(self, address: ir.Value, head: ir.Value) -> Vectors:
        """(k - mu) / lambda."""
        e, vectors = self.e, self._load(address)
        for name, given in (("shift", self.variant.shift), ("scale", self.variant.scale)):
            if given:
                join = e.b.fsub if name == "shift" else e.b.fdiv
                numbers = e.at(self.a[name], (head, 4 * self.layout.head_size))
                pairs = zip(vectors, self._load(numbers, "f32"), strict=True)
                vectors = [join(vector, number) for vector, number in pairs]
        return within_head(e, vectors, self.layout.head_size)

    def _write(self, treated: Vectors, group: int, codes: ir.Value, words: ir.Value) -> None:
        """Rotate and quantise a key or a value, and store its codes and words."""
        e, layout = self.e, self.layout
        vectors = rotated(e, treated, self.a["table"], self.memory)
        per_group, found = group // LANES, []
        for i in range(0, len(vectors), per_group):
            word, group_codes = quantised(e, vectors[i : i + per_group])
            found += group_codes
            e.store(word, words, 2 * layout.block_size * (i // per_group), align=2)
        half = len(found) // 2
        for i, (low, high) in enumerate(zip(found[:half], found[half:], strict=True)):
            packed = e.b.or_(low, e.b.shl(high, e.words(4)))
            e.store(e.b.trunc(packed, VECTOR_I8), codes, LANES * i, align=1)


def quantised(e: Emitter, group: Vectors) -> tuple[ir.Value, Vectors]:
    """A group's word, int16, and its codes, int32 lanes: `reference.quantise`."""
    b = e.b
    largest, negative_low, good = _scale(e, group)
    scale = _best_scale(e, group, negative_low, b.select(good, largest, floats(1.0)))
    most, none = e.words(LARGEST_CODE), e.words(0)

    def cut(code: ir.Value) -> ir.Value:
        code = e.call("llvm.smax.v16i32", VECTOR_I32, code, none)
        return e.call("llvm.smin.v16i32", VECTOR_I32, code, most)

    zero = cut(to_integer(e, b.fdiv(negative_low, scale)))
    codes = [b.select(good, cut(b.add(to_integer(e, b.fdiv(y, scale)), zero)), none) for y in group]
    half = b.sub(b.lshr(bits_of(e, scale), e.words(13)), e.words((127 - 15) << 10))
    word = b.select(good, b.or_(half, zero), e.words(NAN_WORD))
    return b.trunc(first_lane(e, word), I16), codes


def _best_scale(e: Emitter, group: Vectors, negative_low: ir.Value, largest: ir.Value) -> ir.Value:
    """In all lanes: of the `SCALES` from `largest` down, the one with the least squared error."""
    b = e.b
    with e.loop(e.number(SCALES), (largest, floats(math.inf))) as tried:
        steps = e.splat(b.shl(b.trunc(tried.index, I32), ir.Constant(I32, DROPPED_BITS)))
        bits = b.sub(bits_of(e, largest), steps)
        scale = larger(e, b.bitcast(bits, VECTOR_F32), floats(SMALLEST_SCALE))
        error = _squared_error(e, group, negative_low, scale)
        best, least = tried.values
        better = b.fcmp_ordered("<", error, least)
        tried.next_values = b.select(better, scale, best), b.select(better, error, least)
    return tried.values[0]


def _squared_error(e: Emitter, group: Vectors, negative_low: ir.Value, scale: ir.Value) -> ir.Value:
    """In all lanes: the sum of ((code - zero) * scale - y)^2."""
    b, shift, total = e.b, floats(ROUND_TO_INTEGER), floats(0.0)

    def rounded(value: ir.Value) -> ir.Value:
        return b.fsub(b.fadd(b.fdiv(value, scale), shift), shift)

    def cut(code: ir.Value) -> ir.Value:
        return smaller(e, larger(e, code, floats(0.0)), floats(LARGEST_CODE))

    zero = cut(rounded(negative_low))
    for y in group:
        value = b.fmul(b.fsub(cut(b.fadd(rounded(y), zero)), zero), scale)
        difference = b.fsub(value, y)
        total = e.fma(difference, difference, total)
    return folded(e, total, b.fadd)


def _scale(e: Emitter, group: Vectors) -> tuple[ir.Value, ir.Value, ir.Value]:
    """In all lanes: a group's scale, -min(y, 0), and whether a float16 holds the scale."""
    b = e.b
    low = high = floats(0.0)
    is_nan = ir.Constant(ir.VectorType(ir.IntType(1), LANES), None)
    for y in group:
        low, high = smaller(e, y, low), larger(e, y, high)
        is_nan = b.or_(is_nan, b.fcmp_unordered("uno", y, y))
    low = folded(e, low, lambda x, y: smaller(e, x, y))
    high = folded(e, high, lambda x, y: larger(e, x, y))
    raw = larger(e, b.fdiv(b.fsub(high, low), floats(LARGEST_CODE)), floats(SMALLEST_SCALE))
    dropped = (1 << DROPPED_BITS) - 1
    bits = b.and_(b.add(bits_of(e, raw), e.words(dropped)), e.words(~dropped))
    scale = b.bitcast(bits, VECTOR_F32)
    any_nan = b.icmp_unsigned(
        "!=", b.bitcast(is_nan, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0)
    )
    good = b.and_(b.fcmp_ordered("<=", scale, floats(LARGEST_SCALE)), e.splat(b.not_(any_nan)))
    return scale, b.fneg(low), good
