"""LLVM IR of the CPU kernels: which rows, columns and groups the inner functions work on, and when.

Work is cut into tasks: a chunk of rows times a panel of 32 output columns. A thread draws tasks
until none is left. For each group of input channels it unpacks the panel's codes into a tile that
stays in the first-level cache, and multiplies all rows of the chunk by it. Where rows are so few
that registers hold the sums of all, each code is used just once, and the tile would only cost
time: codes are unpacked in registers. Integers with VNNI are multiplied as they are packed.

8-bit rows are first staged, a group of channels a task: converted and regrouped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

from quantkit_kernels.cpu.arithmetic import PANEL, PANEL_BYTES, VECTORS, Arithmetic
from quantkit_kernels.cpu.codes import Codes, Tile
from quantkit_kernels.cpu.inner import build_multiply, build_unpack
from quantkit_kernels.cpu.ir import F32, I64, LANES, VECTOR_F32, Emitter
from quantkit_kernels.cpu.stage import build_stage
from quantkit_kernels.cpu.store import build_store

COUNTERS = ("next_task", "next_slot", "next_stage")
"""The fields of the argument block that threads draw tasks and scratch slots from."""

FIELDS = (
    *COUNTERS, "tasks", "chunks", "chunk_rows", "rows", "groups", "group_words", "steps",
    "pieces", "x", "x_piece", "x_row", "x_group", "x_sums", "x_sums_piece", "x_sums_group", "codes",
    "scales", "scale_panel", "scale_group", "zeros", "bias", "out", "out_row", "out_bf16",
    "scratch", "slot_bytes", "tile_bytes", "source", "source_row", "source_blocks", "group_blocks",
    "x_scales", "x_scale_group", "x_zeros", "x_code_sums", "column_sums", "column_zeros",
    "column_zero_panel", "in_features",
)  # fmt: skip
"""The int64 argument block: addresses, strides in bytes, and counts; bias and zeros may be null.

A scratch slot is a tile of `tile_bytes`, then sums [chunk_rows, 32]. From `source` on they are of
8-bit rows: `source` are their codes, `source_row` bytes apart, `source_blocks` times 16 of them, in
groups of `group_blocks`; scales, zero-points and sums lie at the same distance from row to row.
"""

PREFETCH_BYTES = 16384
"""How far ahead codes that are not unpacked to a tile are asked for: their panels follow each
other, and a thread mostly draws the one that follows."""

RowFunctions = dict[int, ir.Function]
"""multiply functions by the number of rows they take."""


@dataclass(frozen=True)
class _Inner:
    """The inner functions of a module.

    Attributes:
        few: for rows that registers hold.
        many: for blocks of more rows, which multiply a tile.
        unpack: fills the tile; None where codes are multiplied as they are packed.
        store: writes a row's results.
    """

    few: RowFunctions
    many: RowFunctions
    unpack: ir.Function | None
    store: ir.Function


def build_module(arithmetic: Arithmetic) -> ir.Module:
    """The module whose `worker(arguments)` computes tasks until none is left.

    `stager(arguments)` stages 8-bit rows before.
    """
    module = ir.Module()
    _Worker(module, arithmetic, _inner_functions(module, arithmetic)).emit()
    if arithmetic.row_code is not None:
        _build_stager(module, arithmetic)
    return module


def _inner_functions(module: ir.Module, arithmetic: Arithmetic) -> _Inner:
    most, store = arithmetic.max_rows, build_store(module, arithmetic)
    # More than `most` rows, cut into nearly equal blocks, leave no block below half of it.
    half = (most + 1) // 2
    halves = range(half, most + 1)
    if arithmetic.unit == "vnni":
        # The CPU itself looks far enough ahead where few rows leave it time.
        plain, ahead = Tile(arithmetic, "packed"), Tile(arithmetic, "packed", PREFETCH_BYTES)
        few = {
            r: build_multiply(module, arithmetic, r, plain if r < half else ahead)
            for r in range(1, most + 1)
        }
        return _Inner(few, few, None, store)
    codes, direct = Codes(arithmetic, PREFETCH_BYTES), range(1, arithmetic.direct_rows + 1)
    few = {r: build_multiply(module, arithmetic, r, codes) for r in direct}
    many = {r: build_multiply(module, arithmetic, r, Tile(arithmetic)) for r in halves}
    return _Inner(few, many, build_unpack(module, Codes(arithmetic)), store)


@dataclass(frozen=True)
class _Task:
    """A chunk of rows times a panel."""

    first_row: ir.Value
    rows: ir.Value
    panel: ir.Value


class _Worker:
    """Emits `worker`; `a` holds the fields of its argument block."""

    def __init__(self, module: ir.Module, arithmetic: Arithmetic, inner: _Inner) -> None:
        self.e = Emitter(module, "worker", 1)
        self.arithmetic, self.inner = arithmetic, inner
        self.a = _fields(self.e)
        slot = _draw(self.e, "next_slot")
        self.tile = self.e.at(self.a["scratch"], (slot, self.a["slot_bytes"]))
        self.sums = self.e.b.add(self.tile, self.a["tile_bytes"])
        self.no_bias = ir.GlobalVariable(module, ir.ArrayType(F32, PANEL), "no_bias")
        self.no_bias.global_constant = True
        self.no_bias.initializer = ir.Constant(self.no_bias.value_type, [0.0] * PANEL)

    def emit(self) -> None:
        """while (task = next_task++) < tasks: compute it."""
        with _drawn(self.e, "next_task", self.a["tasks"]) as index:
            task = self._task(index)
            self._start(task)
            with self.e.loop(self.a["groups"]) as group:
                self._add_group(task, group.index)
            self._write(task)
        self.e.b.ret_void()

    def _task(self, index: ir.Value) -> _Task:
        b, a = self.e.b, self.a
        first_row = b.mul(b.srem(index, a["chunks"]), a["chunk_rows"])
        return _Task(
            first_row=first_row,
            rows=self.e.minimum(a["chunk_rows"], b.sub(a["rows"], first_row)),
            panel=b.sdiv(index, a["chunks"]),
        )

    def _start(self, task: _Task) -> None:
        """sums[r] = bias, or 0; integers start at 0."""
        e = self.e
        if self.arithmetic.sums_are_integers:
            values = [e.words(0) for _ in VECTORS]
        else:
            bias = self._bias(task)
            values = [e.load(VECTOR_F32, bias, v) for v in VECTORS]
        with e.loop(task.rows) as row:
            for value, v in zip(values, VECTORS, strict=True):
                e.store(value, e.at(self.sums, (row.index, PANEL_BYTES)), v)

    def _bias(self, task: _Task) -> ir.Value:
        """Address of the panel's bias, or of zeros."""
        e, bias = self.e, self.a["bias"]
        given = e.at(bias, (task.panel, PANEL_BYTES))
        return e.b.select(e.is_null(bias), e.b.ptrtoint(self.no_bias, I64), given)

    def _add_group(self, task: _Task, group: ir.Value) -> None:
        """sums += the share of one group."""
        e, a = self.e, self.a
        column = e.at(group, (task.panel, a["groups"]))
        codes = e.at(a["codes"], (e.b.mul(column, a["group_words"]), PANEL_BYTES))
        inner = self.inner
        if inner.unpack is None:
            self._multiply(inner.few, codes, task, group)
            return
        is_many = e.less(e.number(max(inner.few)), task.rows)
        with e.b.if_else(is_many) as (many, few):
            with many:
                e.b.call(inner.unpack, [codes, self.tile, a["group_words"]])
                self._multiply(inner.many, self.tile, task, group)
            with few:
                self._multiply(inner.few, codes, task, group)

    def _multiply(
        self, functions: RowFunctions, weights: ir.Value, task: _Task, group: ir.Value
    ) -> None:
        """sums += each piece of x times `weights`, in blocks of nearly equal rows."""
        e, a, most = self.e, self.a, max(functions)
        blocks = e.b.sdiv(e.b.add(task.rows, e.number(most - 1)), e.number(most))
        with e.loop(a["pieces"]) as piece, e.loop(blocks) as block:
            start = e.b.sdiv(e.b.mul(task.rows, block.index), blocks)
            stop = e.b.sdiv(e.b.mul(task.rows, e.b.add(block.index, e.number(1))), blocks)
            first_row = e.b.add(task.first_row, start)
            x, x_sums = self._inputs(piece.index, first_row, group)
            scales, zeros = self._scales(task, group)
            sums = e.at(self.sums, (start, PANEL_BYTES))
            arguments = [x, a["x_row"], weights, a["steps"], sums, scales, zeros, x_sums]
            arguments += [self._row_scale(first_row, group), a["source_row"]]
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
            e.at(a["scales"], (task.panel, a["scale_panel"]), (group, a["scale_group"])),
            e.b.select(e.is_null(a["zeros"]), e.number(0), zeros),
        )

    def _row_scale(self, row: ir.Value, group: ir.Value | None = None) -> ir.Value:
        """Address of an 8-bit row's scale."""
        a, start = self.a, self.e.at(self.a["x_scales"], (row, self.a["source_row"]))
        return start if group is None else self.e.at(start, (group, a["x_scale_group"]))

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
        e, a = self.e, self.a
        itemsize = e.b.select(e.is_null(a["out_bf16"]), e.number(4), e.number(2))
        shared = [
            self._bias(task),
            e.at(a["scales"], (task.panel, a["scale_panel"])),
            e.at(a["column_sums"], (task.panel, PANEL_BYTES)),
            e.at(a["column_zeros"], (task.panel, a["column_zero_panel"])),
            a["in_features"],
            a["out_bf16"],
        ]
        with e.loop(task.rows) as row:
            index = e.b.add(task.first_row, row.index)
            column = e.b.mul(itemsize, e.number(PANEL))
            target = e.at(a["out"], (index, a["out_row"]), (task.panel, column))
            zero = e.at(a["x_zeros"], (index, a["source_row"]))
            code_sum = e.at(a["x_code_sums"], (index, a["source_row"]))
            sums = e.at(self.sums, (row.index, PANEL_BYTES))
            of_row = [sums, target, self._row_scale(index), zero, code_sum]
            e.b.call(self.inner.store, [*of_row, *shared])


def _build_stager(module: ir.Module, arithmetic: Arithmetic) -> None:
    """while (group = next_stage++) < groups: stage it."""
    stage = build_stage(module, arithmetic)
    e = Emitter(module, "stager", 1)
    a = _fields(e)
    with _drawn(e, "next_stage", a["groups"]) as group:
        done = e.b.mul(group, a["group_blocks"])
        left = e.maximum(e.b.sub(a["source_blocks"], done), e.number(0))
        source = e.at(a["source"], (done, LANES))
        target = e.at(a["x"], (group, a["x_group"]))
        valid = e.minimum(a["group_blocks"], left)
        e.b.call(stage, [source, a["source_row"], a["rows"], valid, a["group_blocks"], target])
    e.b.ret_void()


def _fields(e: Emitter) -> dict[str, ir.Value]:
    """What the argument block holds, without counters."""
    return {
        name: e.load(I64, e.args[0], 8 * i, align=8)
        for i, name in enumerate(FIELDS)
        if name not in COUNTERS
    }


def _draw(e: Emitter, counter: str) -> ir.Value:
    """counter++, atomically."""
    address = e.b.add(e.args[0], e.number(8 * FIELDS.index(counter)))
    pointer = e.b.inttoptr(address, I64.as_pointer())
    return e.b.atomic_rmw("add", pointer, e.number(1), "monotonic")


@contextmanager
def _drawn(e: Emitter, counter: str, stop: ir.Value) -> Iterator[ir.Value]:
    """while (index = counter++) < stop."""
    head, body, done = (e.function.append_basic_block() for _ in range(3))
    e.b.branch(head)
    e.b.position_at_end(head)
    index = _draw(e, counter)
    e.b.cbranch(e.less(index, stop), body, done)
    e.b.position_at_end(body)
    yield index
    e.b.branch(head)
    e.b.position_at_end(done)
