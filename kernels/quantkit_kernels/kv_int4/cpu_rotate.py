"""LLVM IR of the rotation of a head, in registers.

Where P is a power of two, R is a Hadamard matrix of Sylvester's with signs: x R takes log2(P) sums
and differences a vector. Else x is multiplied by the matrix.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from quantkit_kernels.act_quant.cpu_math import floats
from quantkit_kernels.cpu.ir import LANES, VECTOR_F32, Emitter
from quantkit_kernels.kv_int4.cpu_entry import VECTOR_BYTES, broadcast, permuted
from quantkit_kernels.kv_int4.rotation import head_rotation

Vectors = list[ir.Value]
"""A head's P / 16 vectors of float32."""


class Tables(NamedTuple):
    """What kernels read of R.

    Attributes:
        forward: for x R. Float32 [P], the signs over sqrt(P), or [P, P].
        backward: for x R^T.
    """

    forward: Tensor
    backward: Tensor


def is_fast(padded: int) -> bool:
    """R of this order is Sylvester's."""
    return padded & (padded - 1) == 0


@lru_cache(maxsize=64)
def tables(head_size: int) -> Tables:
    """The tables of heads of a size; dimensions that pad a head are 0."""
    rotation = head_rotation(head_size, torch.device("cpu"))
    padded = rotation.shape[1]
    with torch.inference_mode(False):
        square = torch.zeros(padded, padded)
        square[:head_size] = rotation
        if is_fast(padded):
            # The first column of Sylvester's matrix holds ones.
            signs = square[:, 0].contiguous()
            return Tables(signs, signs)
        return Tables(square, square.T.contiguous())


def rotated(e: Emitter, vectors: Vectors, table: ir.Value, memory: ir.Value) -> Vectors:
    """x R; `memory` holds P float32."""
    if not is_fast(LANES * len(vectors)):
        return _multiplied(e, vectors, table, memory)
    return _walsh_hadamard(e, _signed(e, vectors, table))


def unrotated(e: Emitter, vectors: Vectors, table: ir.Value, memory: ir.Value) -> Vectors:
    """x R^T, likewise."""
    if not is_fast(LANES * len(vectors)):
        return _multiplied(e, vectors, table, memory)
    return _signed(e, _walsh_hadamard(e, vectors), table)


def _signed(e: Emitter, vectors: Vectors, table: ir.Value) -> Vectors:
    return [
        e.b.fmul(vector, e.load(VECTOR_F32, table, VECTOR_BYTES * i))
        for i, vector in enumerate(vectors)
    ]


def _walsh_hadamard(e: Emitter, vectors: Vectors) -> Vectors:
    """Sums and differences of coordinates whose numbers differ in one bit, bit by bit."""
    step = 1
    while step < len(vectors):
        pairs = [(i, i ^ step) for i in range(len(vectors))]
        vectors = [
            e.b.fadd(vectors[i], vectors[j]) if i < j else e.b.fsub(vectors[j], vectors[i])
            for i, j in pairs
        ]
        step *= 2
    for bit in (1, 2, 4, 8):
        signs = ir.Constant(VECTOR_F32, [-1.0 if lane & bit else 1.0 for lane in range(LANES)])
        order = [lane ^ bit for lane in range(LANES)]
        vectors = [e.fma(x, signs, permuted(e, x, order)) for x in vectors]
    return vectors


def _multiplied(e: Emitter, vectors: Vectors, table: ir.Value, memory: ir.Value) -> Vectors:
    """The row times the matrix [P, P]."""
    size = LANES * len(vectors)
    for i, vector in enumerate(vectors):
        e.store(vector, memory, VECTOR_BYTES * i)
    with e.loop(e.number(size), [floats(0.0)] * len(vectors)) as row:
        factor = broadcast(e, e.at(memory, (row.index, 4)))
        weights = e.at(table, (row.index, 4 * size))
        row.next_values = [
            e.fma(factor, e.load(VECTOR_F32, weights, VECTOR_BYTES * i), total)
            for i, total in enumerate(row.values)
        ]
    return list(row.values)
