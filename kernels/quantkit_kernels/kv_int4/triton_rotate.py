# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton: rotations of heads by a matrix of signs, in tensor cores and yet to float32's accuracy.

A rotated head of P dimensions lives in two tiles of HP columns, those of low and of high nibbles;
HP is the power of two from P / 2 on. Before it is rotated, its first HP dimensions are one tile,
and the others the second. The signs of R are exact in 16 bits, and so is a float32 split into three
bfloat16.
"""

import triton
import triton.language as tl


@triton.jit
def sign_dot(x, signs, EXACT: tl.constexpr, ASM: tl.constexpr):
    """X signs in float32; x [M, K] of any float dtype, signs [K, N] bfloat16.

    EXACT: of float32 x, 24 bits count. Else 16 do, twice what a result in 16 bits shows.
    """
    if not ASM:  # The interpreter has no bfloat16 arithmetic.
        return tl.dot(x.to(tl.float32), signs.to(tl.float32), input_precision="ieee")
    elif x.dtype != tl.float32:
        return tl.dot(x, signs.to(x.dtype))
    else:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        if EXACT:
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            return tl.dot(high, signs, tl.dot(middle, signs, tl.dot(low, signs)))
        else:
            return tl.dot(high, signs, tl.dot(middle, signs))


@triton.jit
def turn(
    first,
    second,
    signs_ptr,
    factor,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    EXACT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Factor x R, or with BACK factor x R^T, float32 tiles [M, HP] of x in tiles [M, HP].

    A quarter of R at a time, in a loop: all four would not fit the registers.

    Args:
        signs_ptr: bfloat16 [D, 2 HALF], those of R.
        factor: P ** -0.5, and what else there is.
    """
    HP: tl.constexpr = triton.next_power_of_2(HALF)
    one = tl.zeros(first.shape, tl.float32)
    other = tl.zeros(first.shape, tl.float32)
    for quarter in tl.range(4, num_stages=1):
        source = quarter % 2
        target = quarter // 2
        d = (target if BACK else source) * HP + tl.arange(0, HP)[:, None]
        i = tl.arange(0, HP)[None, :]
        pointers = signs_ptr + d * (2 * HALF) + (source if BACK else target) * HALF + i
        signs = tl.load(pointers, mask=(d < D) & (i < HALF), other=0.0)
        if BACK:
            signs = tl.trans(signs)
        part = sign_dot(tl.where(source == 0, first, second), signs, EXACT, ASM)
        one += tl.where(target == 0, part, 0.0)
        other += tl.where(target == 1, part, 0.0)
    return one * factor, other * factor


@triton.jit
def load_head(pointers, real, D: tl.constexpr, HALF: tl.constexpr):
    """Heads [D] at addresses [M] as two tiles [M, HP], 0 behind D and where not real."""
    HP: tl.constexpr = triton.next_power_of_2(HALF)
    d = tl.arange(0, HP)[None, :]
    inside = real[:, None]
    first = tl.load(pointers[:, None] + d, mask=inside & (d < D), other=0.0)
    second = tl.load(pointers[:, None] + HP + d, mask=inside & (HP + d < D), other=0.0)
    return first, second


@triton.jit
def load_row(pointer, D: tl.constexpr, HALF: tl.constexpr):
    """One head [D] as two tiles [1, HP], 0 behind D."""
    HP: tl.constexpr = triton.next_power_of_2(HALF)
    d = tl.arange(0, HP)[None, :]
    first = tl.load(pointer + d, mask=d < D, other=0.0)
    second = tl.load(pointer + HP + d, mask=HP + d < D, other=0.0)
    return first, second


@triton.jit
def store_head(pointers, real, first, second, D: tl.constexpr, HALF: tl.constexpr):
    """The inverse of `load_head`, rounded to what the addresses point at."""
    HP: tl.constexpr = triton.next_power_of_2(HALF)
    d = tl.arange(0, HP)[None, :]
    inside = real[:, None]
    dtype = pointers.dtype.element_ty
    tl.store(pointers[:, None] + d, first.to(dtype), mask=inside & (d < D))
    tl.store(pointers[:, None] + HP + d, second.to(dtype), mask=inside & (HP + d < D))


@triton.jit(do_not_specialize=["rows"])
def rotate_queries(
    query_ptr,
    shift_ptr,
    scale_ptr,
    signs_ptr,
    out_ptr,
    products_ptr,
    rows,
    q_heads,
    token_stride,
    head_stride,
    factor,
    root,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    M: tl.constexpr,
    ASM: tl.constexpr,
):
    """q' = factor (scale * q) R, and factor q . shift; a program has M rows of token and head.

    Args:
        query_ptr: [tokens, q_heads, D].
        shift_ptr, scale_ptr: float32 [q_heads / G, D], or None for 0 and 1.
        signs_ptr: bfloat16 [D, 2 HALF].
        out_ptr: [rows, 2 HALF] in the dtype of queries.
        products_ptr: float32 [rows], or None.
        rows: tokens * q_heads.
        root: P ** -0.5.
    """
    HP: tl.constexpr = triton.next_power_of_2(HALF)
    row = tl.program_id(0) * M + tl.arange(0, M)
    real = row < rows
    offsets = (row // q_heads).to(tl.int64) * token_stride + row % q_heads * head_stride
    first, second = load_head(query_ptr + offsets, real, D, HALF)
    treatment = row % q_heads // G * D
    if products_ptr is not None:
        shift, more = load_head(shift_ptr + treatment, real, D, HALF)
        product = tl.sum(first.to(tl.float32) * shift + second.to(tl.float32) * more, axis=1)
        tl.store(products_ptr + row, product * factor, mask=real)
    if scale_ptr is not None:
        scale, more = load_head(scale_ptr + treatment, real, D, HALF)
        first = first.to(tl.float32) * scale
        second = second.to(tl.float32) * more
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    low, high = turn(first, second, signs_ptr, factor * root, D, HALF, False, EXACT, ASM)
    i = tl.arange(0, HP)
    out = out_ptr + row.to(tl.int64)[:, None] * (2 * HALF) + i[None, :]
    stored = real[:, None] & (i < HALF)[None, :]
    tl.store(out, low.to(out_ptr.dtype.element_ty), mask=stored)
    tl.store(out + HALF, high.to(out_ptr.dtype.element_ty), mask=stored)
