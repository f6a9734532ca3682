# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""How the activation kernel reads a row and writes parts of one."""

import triton
import triton.language as tl

from quantkit_kernels.act_quant.triton_math import (
    add,
    larger,
    largest,
    silu,
    smaller,
    smallest,
)


@triton.jit
def load(row, columns, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Channels of a row, 0 beyond WIDTH; WHOLE: none is beyond."""
    if WHOLE:
        return tl.load(row + columns)
    else:
        return tl.load(row + columns, mask=columns < WIDTH, other=0.0)


@triton.jit
def store(row, columns, values, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Write channels of a row."""
    if WHOLE:
        tl.store(row + columns, values)
    else:
        tl.store(row + columns, values, mask=columns < WIDTH)


@triton.jit
def halves(values, SIZE: tl.constexpr):
    """[N, 2 SIZE] as two [N, SIZE], left and right."""
    parted = tl.reshape(values, (values.shape[0], 2, SIZE))
    return tl.split(tl.trans(parted, (0, 2, 1)))


@triton.jit
def store_pieces(row, first, values, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Write channels of a row, 16 neighbours a thread: as pieces of 16 bytes, each its own store.

    The compiler would give a store's neighbours to other threads, through shared memory.
    """
    COUNT: tl.constexpr = values.shape[0] // 16
    SIZE: tl.constexpr = 128 // values.dtype.primitive_bitwidth
    columns = first + tl.arange(0, COUNT)[:, None] * 16 + tl.arange(0, SIZE)[None, :]
    left, right = halves(tl.reshape(values, (COUNT, 16)), 8)
    if SIZE == 8:
        store(row, columns, left, WIDTH, WHOLE)
        store(row, columns + 8, right, WIDTH, WHOLE)
    else:
        for piece in tl.static_range(2):
            one, other = halves(left if piece == 0 else right, 4)
            store(row, columns + 8 * piece, one, WIDTH, WHOLE)
            store(row, columns + 8 * piece + 4, other, WIDTH, WHOLE)


@triton.jit
def load_values(
    x,
    residual,
    columns,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    ASM: tl.constexpr,
):
    """x, x + residual in their dtype, or silu(gate) * up in float32: [C] of the rows given."""
    values = load(x, columns, WIDTH, WHOLE)
    if KIND == "silu_mul":
        up = load(x + WIDTH, columns, WIDTH, WHOLE).to(tl.float32)
        values = silu(values.to(tl.float32), ASM) * up
    elif KIND == "add_norm":
        values = add(values, load(residual, columns, WIDTH, WHOLE), ASM)
    return values


@triton.jit
def read_row(
    x,
    residual,
    total,
    weight_ptr,
    KIND: tl.constexpr,
    RANGE: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    ASM: tl.constexpr,
):
    """A row's values in chunks of C, times the norm's weight, and what threads have seen of them.

    Returns:
        the chunks; each float32 [C / 16], of the 16 neighbours that a thread has of every chunk:
        sums of squares before the weight; the largest value for RANGE "both", the largest magnitude
        for "magnitude"; the smallest value for "both".
    """
    STEPS: tl.constexpr = (WIDTH + C - 1) // C
    LATER: tl.constexpr = STEPS * x.dtype.element_ty.primitive_bitwidth <= 64
    chunks = ()
    totals = ()
    squares = tl.zeros((C // 16,), tl.float32)
    high = tl.zeros((C // 16,), tl.float32)
    low = tl.zeros((C // 16,), tl.float32)
    for i in tl.static_range(STEPS):
        columns = i * C + tl.arange(0, C)
        loaded = load_values(x, residual, columns, KIND, WIDTH, (i + 1) * C <= WIDTH, ASM)
        values = loaded.to(tl.float32)
        if weight_ptr is not None:
            near = tl.reshape(values, (C // 16, 16))
            squares += tl.sum(near * near, axis=1)
            weight = load(weight_ptr, columns, WIDTH, (i + 1) * C <= WIDTH)
            values = values * weight.to(tl.float32)
        near = tl.reshape(values, (C // 16, 16))
        if RANGE == "both":
            high = larger(high, largest(near, 1, ASM))
            low = smaller(low, smallest(near, 1, ASM))
        elif RANGE == "magnitude":
            high = larger(high, largest(tl.abs(near), 1, ASM))
        chunks += (values,)  # type: ignore[assignment]
        totals += (loaded,)  # type: ignore[assignment]
        if KIND == "add_norm" and not LATER:
            store_pieces(total, i * C, loaded, WIDTH, (i + 1) * C <= WIDTH)
    # No load is asked for before a store that it might read, so stores wait: in registers, which
    # wide rows of float32 do not leave.
    if KIND == "add_norm" and LATER:
        for i in tl.static_range(STEPS):
            store_pieces(total, i * C, totals[i], WIDTH, (i + 1) * C <= WIDTH)
    return chunks, squares, high, low
