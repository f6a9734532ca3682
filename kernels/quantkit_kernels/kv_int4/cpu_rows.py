"""LLVM IR that reads and writes heads: any number of dimensions, any float dtype."""

from __future__ import annotations

from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import (
    SIZE,
    Float,
    floats,
    load_floats,
    narrow,
    store_floats,
)
from quantkit_kernels.cpu.ir import LANES, Emitter
from quantkit_kernels.kv_int4.cpu_rotate import Vectors

LANE_BITS = ir.VectorType(ir.IntType(1), LANES)


def masks(head_size: int) -> list[ir.Value]:
    """For each vector that holds dimensions of the head, a mask of them; None where all are."""
    whole, rest = divmod(head_size, LANES)
    partial = [ir.Constant(LANE_BITS, [lane < rest for lane in range(LANES)])] if rest else []
    return [None] * whole + partial


def load_head(e: Emitter, kind: Float, address: ir.Value, head_size: int, padded: int) -> Vectors:
    """A head as float32, 0 in the dimensions that pad it."""
    vectors = [
        load_floats(e, kind, e.b.add(address, e.number(SIZE[kind] * LANES * i)), mask)
        for i, mask in enumerate(masks(head_size))
    ]
    return vectors + [floats(0.0)] * (padded // LANES - len(vectors))


def store_head(
    e: Emitter, kind: Float, vectors: Vectors, address: ir.Value, head_size: int
) -> None:
    """Write the dimensions of the head."""
    for i, mask in enumerate(masks(head_size)):
        target = e.b.add(address, e.number(SIZE[kind] * LANES * i))
        store_floats(e, kind, narrow(e, kind, vectors[i]), target, mask)


def within_head(e: Emitter, vectors: Vectors, head_size: int) -> Vectors:
    """The same with 0 in the dimensions that pad a head, whatever was there."""
    known = masks(head_size)
    kept = [
        vector if mask is None else e.b.select(mask, vector, floats(0.0))
        for vector, mask in zip(vectors, known, strict=False)
    ]
    return kept + [floats(0.0)] * (len(vectors) - len(kept))
