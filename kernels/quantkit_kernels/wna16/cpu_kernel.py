"""LLVM IR of the CPU kernel: which rows, columns and groups the inner functions work on, and when.

Work is cut into tasks: a chunk of rows times a panel of 32 output columns. A thread draws tasks
until none is left. For each group of input channels it unpacks the panel's codes into a tile that
stays in the first-level cache, and multiplies all rows of the chunk by it. Where rows are so few
that registers hold the sums of all, each code is used just once, and the tile would only cost
time: codes are unpacked in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from quantkit_kernels.cpu_ir import (
    F32,
    I64,
    VECTOR_F32,
    VECTOR_I16,
    VECTOR_I32,
    Emitter,
)
from quantkit_kernels.wna16.cpu_inner import (
    PANEL,
    PANEL_BYTES,
    VECTORS,
    Arithmetic,
    Codes,
    Tile,
    build_multiply,
    build_unpack,
)

COUNTERS = ("next_task", "next_slot")
"""The fields of the argument block that threads draw tasks and scratch slots from."""

FIELDS = (
    *COUNTERS, "tasks", "chunks", "chunk_rows", "rows", "groups", "group_words", "steps",
    "pieces", "x", "x_piece", "x_row", "x_group", "x_sums", "x_sums_piece", "x_sums_group", "codes",
    "scales", "zeros", "bias", "out", "out_row", "out_bf16", "scratch", "slot_bytes", "tile_bytes",
)  # fmt: skip
"""The int64 argument block: addresses, strides in bytes, and counts; bias and zeros may be null.

A scratch slot is a tile of `tile_bytes`, then sums float32 [chunk_rows, 32].
"""

RowFunctions = dict[int, ir.Function]
"""multiply functions by the number of rows they take."""


def build_module(arithmetic: Arithmetic) -> ir.Module:
    """The module whose `worker(arguments)` computes tasks until none is left."""
    module = ir.Module()
    codes, most = Codes(arithmetic), arithmetic.max_rows
    few = {r: build_multiply(module, arithmetic, r, codes) for r in range(1, most + 1)}
    # More than `most` rows, cut into nearly equal blocks, leave no block below half of it.
    halves = range((most + 1) // 2, most + 1)
    many = {r: build_multiply(module, arithmetic, r, Tile()) for r in halves}
    _Worker(module, build_unpack(module, codes), few, many).emit()
    return module


@dataclass(frozen=True)
class _Task:
    """A chunk of rows times a panel."""

    first_row: ir.Value
    rows: ir.Value
    panel: ir.Value


class _Worker:
    """Emits `worker`; `a` holds the fields of its argument block."""

    def __init__(
        self, module: ir.Module, unpack: ir.Function, few: RowFunctions, many: RowFunctions
    ) -> None:
        self.e = Emitter(module, "worker", 1)
        self.unpack, self.few, self.many = unpack, few, many
        self.a = {
            name: self.e.load(I64, self.e.args[0], 8 * i, align=8)
            for i, name in enumerate(FIELDS)
            if name not in COUNTERS
        }
        slot = self._draw("next_slot")
        self.tile = self.e.at(self.a["scratch"], (slot, self.a["slot_bytes"]))
        self.sums = self.e.b.add(self.tile, self.a["tile_bytes"])
        self.no_bias = ir.GlobalVariable(module, ir.ArrayType(F32, PANEL), "no_bias")
        self.no_bias.global_constant = True
        self.no_bias.initializer = ir.Constant(self.no_bias.value_type, [0.0] * PANEL)

    def emit(self) -> None:
        """while (task = next_task++) < tasks: compute it."""
        e, a = self.e, self.a
        head, body, done = (e.function.append_basic_block() for _ in range(3))
        e.b.branch(head)
        e.b.position_at_end(head)
        index = self._draw("next_task")
        e.b.cbranch(e.less(index, a["tasks"]), body, done)
        e.b.position_at_end(body)
        task = self._task(index)
        self._start(task)
        with e.loop(a["groups"]) as group:
            self._add_group(task, group.index)
        self._write(task)
        e.b.branch(head)
        e.b.position_at_end(done)
        e.b.ret_void()

    def _draw(self, counter: str) -> ir.Value:
        """counter++, atomically."""
        address = self.e.b.add(self.e.args[0], self.e.number(8 * FIELDS.index(counter)))
        pointer = self.e.b.inttoptr(address, I64.as_pointer())
        return self.e.b.atomic_rmw("add", pointer, self.e.number(1), "monotonic")

    def _task(self, index: ir.Value) -> _Task:
        b, a = self.e.b, self.a
        first_row = b.mul(b.srem(index, a["chunks"]), a["chunk_rows"])
        return _Task(
            first_row=first_row,
            rows=self.e.minimum(a["chunk_rows"], b.sub(a["rows"], first_row)),
            panel=b.sdiv(index, a["chunks"]),
        )

    def _start(self, task: _Task) -> None:
        """sums[r] = bias, or 0."""
        e, bias = self.e, self.a["bias"]
        given = e.at(bias, (task.panel, PANEL_BYTES))
        source = e.b.select(e.is_null(bias), e.b.ptrtoint(self.no_bias, I64), given)
        values = [e.load(VECTOR_F32, source, v) for v in VECTORS]
        with e.loop(task.rows) as row:
            for value, v in zip(values, VECTORS, strict=True):
                e.store(value, e.at(self.sums, (row.index, PANEL_BYTES)), v)

    def _add_group(self, task: _Task, group: ir.Value) -> None:
        """sums += the share of one group."""
        e, a = self.e, self.a
        column = e.at(group, (task.panel, a["groups"]))
        codes = e.at(a["codes"], (e.b.mul(column, a["group_words"]), PANEL_BYTES))
        is_many = e.less(e.number(max(self.few)), task.rows)
        with e.b.if_else(is_many) as (many, few):
            with many:
                e.b.call(self.unpack, [codes, self.tile, a["group_words"]])
                self._multiply(self.many, self.tile, task, group)
            with few:
                self._multiply(self.few, codes, task, group)

    def _multiply(
        self, functions: RowFunctions, weights: ir.Value, task: _Task, group: ir.Value
    ) -> None:
        """sums += each piece of x times `weights`, in blocks of nearly equal rows."""
        e, a, most = self.e, self.a, max(functions)
        blocks = e.b.sdiv(e.b.add(task.rows, e.number(most - 1)), e.number(most))
        with e.loop(a["pieces"]) as piece, e.loop(blocks) as block:
            start = e.b.sdiv(e.b.mul(task.rows, block.index), blocks)
            stop = e.b.sdiv(e.b.mul(task.rows, e.b.add(block.index, e.number(1))), blocks)
            x, x_sums = self._inputs(piece.index, e.b.add(task.first_row, start), group)
            scales, zeros = self._scales(task, group)
            sums = e.at(self.sums, (start, PANEL_BYTES))
            arguments = [x, a["x_row"], weights, a["steps"], sums, scales, zeros, x_sums]
            self._call(functions, e.b.sub(stop, start), arguments)

    def _inputs(self, piece: ir.Value, row: ir.Value, group: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Addresses of x and of its sum over the group."""
        e, a = self.e, self.a
        return (
            e.at(a["x"], (piece, a["x_piece"]), (row, a["x_row"]), (group, a["x_group"])),
            e.at(a["x_sums"], (piece, a["x_sums_piece"]), (group, a["x_sums_group"]), (row, 4)),
        )

    def _scales(self, task: _Task, group: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Addresses of scales and zeros; the latter null where there are none."""
        e, a = self.e, self.a
        column = e.at(group, (task.panel, a["groups"]))
        zeros = e.at(a["zeros"], (column, PANEL))
        return (
            e.at(a["scales"], (column, PANEL_BYTES)),
            e.b.select(e.is_null(a["zeros"]), e.number(0), zeros),
        )

    def _call(self, functions: RowFunctions, rows: ir.Value, arguments: list[ir.Value]) -> None:
        """functions[rows](*arguments)."""
        e = self.e
        done = e.function.append_basic_block()
        choice = e.b.switch(rows, done)
        for count, function in functions.items():
            block = e.function.append_basic_block()
            choice.add_case(e.number(count), block)
            e.b.position_at_end(block)
            e.b.call(function, arguments)
            e.b.branch(done)
        e.b.position_at_end(done)

    def _write(self, task: _Task) -> None:
        """out[r, n] = sums, as float32 or bfloat16."""
        with self.e.b.if_else(self.e.is_null(self.a["out_bf16"])) as (float32, bfloat16):
            with float32:
                self._write_as(task, itemsize=4)
            with bfloat16:
                self._write_as(task, itemsize=2)

    def _write_as(self, task: _Task, itemsize: int) -> None:
        e, a = self.e, self.a
        with e.loop(task.rows) as row:
            source = e.at(self.sums, (row.index, PANEL_BYTES))
            target = e.at(
                a["out"],
                (e.b.add(task.first_row, row.index), a["out_row"]),
                (task.panel, PANEL * itemsize),
            )
            for v in VECTORS:
                value = e.load(VECTOR_F32, source, v)
                stored = _to_bf16(e, value) if itemsize == 2 else value
                e.store(stored, target, v // 4 * itemsize, align=itemsize)


def _to_bf16(e: Emitter, value: ir.Value) -> ir.Value:
    """The bits of the nearest bfloat16, half to even; NaN stays NaN."""
    bits = e.b.bitcast(value, VECTOR_I32)
    odd = e.b.and_(e.b.lshr(bits, e.words(16)), e.words(1))
    rounded = e.b.lshr(e.b.add(bits, e.b.add(odd, e.words(0x7FFF))), e.words(16))
    is_nan = e.b.fcmp_unordered("uno", value, value)
    return e.b.trunc(e.b.select(is_nan, e.words(0x7FC0), rounded), VECTOR_I16)
