"""LLVM IR that turns 8-bit rows into what the inner functions multiply, group by group."""

from __future__ import annotations

from llvmlite import ir

from quantkit_kernels.cpu.arithmetic import Arithmetic
from quantkit_kernels.cpu.codes import float8_to_float
from quantkit_kernels.cpu.ir import (
    LANES,
    VECTOR_F32,
    VECTOR_I8,
    VECTOR_I16,
    VECTOR_I32,
    Emitter,
)

INTERLEAVED = (0, 2, 1, 3)
"""Channels in the order of the bytes of a word of 8-bit codes."""


def build_stage(module: ir.Module, arithmetic: Arithmetic) -> ir.Function:
    """stage(source, source_row, rows, valid, blocks, target): the codes of one group of channels.

    source: the group's first code of the first row; rows lie `source_row` bytes apart.
    valid, blocks: of 16 channels, how many the rows have, and how many the target has a row.
    target: [rows, blocks, 16] channels, zero beyond `valid`.
    """
    e = Emitter(module, "stage", 6)
    source, source_row, rows, valid, blocks, target = e.args
    kind = staged_type(arithmetic)
    size = LANES * kind.element.width // 8 if kind != VECTOR_F32 else 4 * LANES
    with e.loop(rows) as row:
        start = e.at(source, (row.index, source_row))
        first = e.at(target, (e.b.mul(row.index, blocks), size))
        with e.loop(valid) as block:
            codes = e.load(VECTOR_I8, e.at(start, (block.index, LANES)), align=1)
            e.store(_staged(e, arithmetic, codes), e.at(first, (block.index, size)), align=1)
        rest = e.at(first, (valid, size))
        with e.loop(e.b.sub(blocks, valid)) as block:
            e.store(ir.Constant(kind, None), e.at(rest, (block.index, size)), align=1)
    e.b.ret_void()
    return e.function


def staged_type(arithmetic: Arithmetic) -> ir.VectorType:
    """16 channels as they are multiplied."""
    return {"vnni": VECTOR_I8, "bf16": VECTOR_I16, "fma": VECTOR_F32}[arithmetic.unit]


def _staged(e: Emitter, arithmetic: Arithmetic, codes: ir.Value) -> ir.Value:
    if arithmetic.unit == "vnni":
        order = [4 * i + j for i in range(LANES // 4) for j in INTERLEAVED]
        shuffled = e.b.shuffle_vector(codes, codes, ir.Constant(VECTOR_I32, order))
        return e.b.xor(shuffled, ir.Constant(VECTOR_I8, [-128] * LANES))
    if arithmetic.row_code == "int8":
        value = e.b.sitofp(codes, VECTOR_F32)
    else:
        value = float8_to_float(e, e.b.zext(codes, VECTOR_I32), "e4m3")
    if arithmetic.unit == "fma":
        return value
    return e.b.trunc(e.b.lshr(e.b.bitcast(value, VECTOR_I32), e.words(16)), VECTOR_I16)
