"""LLVM IR of the CPU kernels' inner functions: unpack codes, multiply a few rows by a panel."""

from __future__ import annotations

import functools

from llvmlite import ir

from quantkit_kernels.cpu.arithmetic import (
    LINE_BYTES,
    PANEL_BYTES,
    VECTORS,
    Arithmetic,
    add,
    multiply_add,
    sum_type,
)
from quantkit_kernels.cpu.codes import Codes, Weights
from quantkit_kernels.cpu.ir import F32, LANES, VECTOR_F32, VECTOR_I8, VECTOR_I32, Emitter

MAX_CHAINS = 4
"""Independent sums per output that hide the latency of a multiply-add when rows are few."""


def build_unpack(module: ir.Module, codes: Codes) -> ir.Function:
    """unpack(source, tile, words): `words` words of a panel to a `Tile`."""
    e = Emitter(module, "unpack", 3)
    source, tile, words = e.args
    stride = codes.arithmetic.weight_pieces * PANEL_BYTES
    with e.loop(words) as word:
        target = e.at(tile, (word.index, codes.steps * stride))
        # The panel's next group follows: it arrives while this one is multiplied, in the
        # second-level cache, as the first is full of this one.
        ahead = e.at(source, (e.b.add(word.index, words), PANEL_BYTES))
        for v in VECTORS:
            e.prefetch(ahead, v, level=2)
        for step, pieces in enumerate(codes.block(e, source, word.index)):
            for piece, vectors in enumerate(pieces):
                for v, lanes in zip(VECTORS, vectors, strict=True):
                    e.store(lanes, target, step * stride + piece * PANEL_BYTES + v)
    e.b.ret_void()
    return e.function


def build_multiply(
    module: ir.Module, arithmetic: Arithmetic, rows: int, weights: Weights
) -> ir.Function:
    """sums[r] += the share of one group: one panel, `rows` rows.

    multiply(x, x_row, weights, steps, sums, scales, zeros, x_sums, x_scales, x_scale_row):

    Floating-point rows: scales (x[r] . weights - zeros x_sums[r]); x_sums float32 [rows], zeros may
    be null. E4M3 rows: scales x_scales[r] (x[r] . weights). Integers: x[r] . weights.
    """
    e = Emitter(module, f"multiply_{weights.name}_{rows}", 10)
    x, x_row, source, steps, sums, scales, zeros, x_sums, x_scales, x_scale_row = e.args
    inputs = [e.at(x, (e.number(row), x_row)) for row in range(rows + 1)]
    dots = _dots(e, arithmetic, inputs, weights, source, steps)
    if arithmetic.sums_are_integers:
        _add_integers(e, dots, sums)
    else:
        if arithmetic.row_code is None:
            dots = _without_zeros(e, dots, zeros, x_sums)
        else:
            dots = _times_row_scales(e, dots, x_scales, x_scale_row)
        _add_scaled(e, dots, scales, sums)
    e.b.ret_void()
    return e.function


def _add_scaled(e: Emitter, dots: list[ir.Value], scales: ir.Value, sums: ir.Value) -> None:
    """sums += scales dots."""
    scale = [e.load(VECTOR_F32, scales, v) for v in VECTORS]
    for i, dot in enumerate(dots):
        offset = i * 4 * LANES
        before = e.load(VECTOR_F32, sums, offset)
        e.store(e.fma(dot, scale[i % len(VECTORS)], before), sums, offset)


def _add_integers(e: Emitter, dots: list[ir.Value], sums: ir.Value) -> None:
    """sums += dots; those summed in float32 are whole numbers below 2**24."""
    for i, dot in enumerate(dots):
        whole = dot if dot.type == VECTOR_I32 else e.b.fptosi(dot, VECTOR_I32)
        offset = i * 4 * LANES
        e.store(e.b.add(e.load(VECTOR_I32, sums, offset), whole), sums, offset)


def _times_row_scales(
    e: Emitter, dots: list[ir.Value], scales: ir.Value, stride: ir.Value
) -> list[ir.Value]:
    """dots[r] scales[r]."""
    rows = range(len(dots) // len(VECTORS))
    factors = [e.splat(e.load(F32, e.at(scales, (e.number(row), stride)))) for row in rows]
    return [e.b.fmul(dot, factors[i // len(VECTORS)]) for i, dot in enumerate(dots)]


def _dots(
    e: Emitter,
    arithmetic: Arithmetic,
    inputs: list[ir.Value],
    weights: Weights,
    source: ir.Value,
    steps: ir.Value,
) -> list[ir.Value]:
    """x . weights for each row and vector: [row 0 low, row 0 high, row 1 low, ...].

    `inputs` are the addresses of the rows and of the row that follows them.
    """
    *x, following = inputs
    width, lanes = 2 * len(x), sum_type(arithmetic)
    chains = max(1, min(MAX_CHAINS, arithmetic.max_rows, weights.steps) // len(x))
    zero = ir.Constant(lanes, [0] * LANES if lanes == VECTOR_I32 else [0.0] * LANES)
    blocks = e.b.sdiv(steps, e.number(weights.steps))
    with e.loop(blocks, [zero] * (width * chains)) as block:
        sums = list(block.values)
        if weights.reused:
            _prefetch_rows(e, following, block.index, 4 * weights.steps * len(x))
        for step, pieces in enumerate(weights.block(e, source, block.index)):
            first = (step % chains) * width
            for row, base in enumerate(x):
                address = e.at(base, (block.index, 4 * weights.steps))
                value = e.splat(e.load(lanes.element, address, 4 * step, align=2))
                for i, weight in ((i, w) for piece in pieces for i, w in enumerate(piece)):
                    slot = first + 2 * row + i
                    sums[slot] = multiply_add(e, arithmetic.unit, value, weight, sums[slot])
        block.next_values = sums
    partial = [block.values[chain * width :][:width] for chain in range(chains)]
    adder = functools.partial(add, e)
    return [functools.reduce(adder, parts) for parts in zip(*partial, strict=True)]


def _prefetch_rows(e: Emitter, rows: ir.Value, block: ir.Value, size: int) -> None:
    """Ask for a block's share of the rows that come next: of many, not all stay in cache."""
    for line in range(0, size, LINE_BYTES):
        e.prefetch(e.at(rows, (block, size)), line)


def _without_zeros(
    e: Emitter, dots: list[ir.Value], zeros: ir.Value, x_sums: ir.Value
) -> list[ir.Value]:
    """dots - zeros x_sums, skipped where zeros is null."""
    before = e.b.block
    with e.b.if_then(e.b.not_(e.is_null(zeros))):
        zero = [e.b.sitofp(e.load(VECTOR_I8, zeros, v // 4, align=1), VECTOR_F32) for v in VECTORS]
        negative = [
            e.splat(e.b.fneg(e.load(F32, x_sums, 4 * row))) for row in range(len(dots) // 2)
        ]
        corrected = [e.fma(negative[i // 2], zero[i % 2], dot) for i, dot in enumerate(dots)]
        inside = e.b.block
    merged = [e.b.phi(VECTOR_F32) for _ in dots]
    for phi, dot, better in zip(merged, dots, corrected, strict=True):
        phi.add_incoming(dot, before)
        phi.add_incoming(better, inside)
    return merged
