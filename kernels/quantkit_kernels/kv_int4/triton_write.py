# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels: keys and values rotated, quantised and written to the cache, and read from it."""

import triton
import triton.language as tl

from quantkit_kernels.kv_int4.triton_codes import scale_of
from quantkit_kernels.kv_int4.triton_quantise import quantise
from quantkit_kernels.kv_int4.triton_rotate import load_head, turn


@triton.jit
def treat(x, FIRST: tl.constexpr, shift_ptr, scale_ptr, D: tl.constexpr, HP: tl.constexpr):
    """(x - shift) / scale in float32, or x [M, HP] as it is: dimensions from FIRST on of a head."""
    d = FIRST + tl.arange(0, HP)
    if shift_ptr is not None:
        x = x.to(tl.float32) - tl.load(shift_ptr + d, mask=d < D, other=0.0)[None, :]
    if scale_ptr is not None:
        x = tl.div_rn(x.to(tl.float32), tl.load(scale_ptr + d, mask=d < D, other=1.0)[None, :])
    return x


@triton.jit
def key_bytes(
    heads,
    shift_ptr,
    scale_ptr,
    signs_ptr,
    words,
    real,
    root,
    D: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Bytes [M, HP] of the keys at addresses [M]; the words are stored."""
    HP: tl.constexpr = triton.next_power_of_2(HALF)
    first, second = load_head(heads, real, D, HALF)
    first = treat(first, 0, shift_ptr, scale_ptr, D, HP)
    second = treat(second, HP, shift_ptr, scale_ptr, D, HP)
    low, high = turn(first, second, signs_ptr, root, D, HALF, False, True, ASM)
    return quantise(low, high, words, real, HALF, GROUP, BS)


@triton.jit
def value_bytes(
    heads,
    signs_ptr,
    words,
    real,
    root,
    D: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Bytes [M, HP] of the values at addresses [M]; the words are stored."""
    first, second = load_head(heads, real, D, HALF)
    low, high = turn(first, second, signs_ptr, root, D, HALF, False, True, ASM)
    return quantise(low, high, words, real, HALF, GROUP, BS)


@triton.jit(do_not_specialize=["tokens"])
def write_heads(
    key_ptr,
    value_ptr,
    shift_ptr,
    scale_ptr,
    signs_ptr,
    cache_ptr,
    slots_ptr,
    tokens,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    block_stride,
    head_stride,
    root,
    D: tl.constexpr,
    HALF: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    BS: tl.constexpr,
    M: tl.constexpr,
    ASM: tl.constexpr,
):
    """cache[slots] = quantised ((key - shift) / scale) R, value R.

    Programs are (M tokens, KV head, keys or values).

    Args:
        key_ptr, value_ptr: [tokens, heads, D].
        shift_ptr, scale_ptr: float32 [heads, D], or None.
        signs_ptr: bfloat16 [D, 2 HALF], those of R.
        cache_ptr: uint8, in `CacheLayout` with columns of values.
        slots_ptr: int64 [tokens]; negative ones are skipped.
        root: P ** -0.5.
    """
    P: tl.constexpr = 2 * HALF
    head = tl.program_id(1)
    row = tl.program_id(0) * M + tl.arange(0, M)
    slot = tl.load(slots_ptr + row, mask=row < tokens, other=-1)
    real = slot >= 0
    slot = tl.where(real, slot, 0)
    token = (slot % BS).to(tl.int32)
    block = cache_ptr + slot // BS * block_stride + head * head_stride
    words = (block + BS * P).to(tl.pointer_type(tl.int16)) + token
    i = tl.arange(0, triton.next_power_of_2(HALF))
    wide = row.to(tl.int64)
    if tl.program_id(2) == 0:
        heads = key_ptr + wide * key_stride + head * key_head_stride
        codes = key_bytes(
            heads,
            None if shift_ptr is None else shift_ptr + head * D,
            None if scale_ptr is None else scale_ptr + head * D,
            signs_ptr,
            words,
            real,
            root,
            D,
            HALF,
            KEY_GROUP,
            BS,
            ASM,
        )
        out = (block + token * HALF)[:, None] + i[None, :]
        tl.store(out, codes, mask=real[:, None] & (i < HALF)[None, :])
    else:
        heads = value_ptr + wide * value_stride + head * value_head_stride
        words += P // KEY_GROUP * BS
        codes = value_bytes(heads, signs_ptr, words, real, root, D, HALF, VALUE_GROUP, BS, ASM)
        # Transposed, so that a warp stores the bytes of neighbouring tokens.
        columns = (block + BS * HALF + token)[None, :] + i[:, None] * BS
        tl.store(columns, tl.trans(codes), mask=(i < HALF)[:, None] & real[None, :])


@triton.jit
def dequantised(codes, words, dims, inside, GROUP: tl.constexpr, BS: tl.constexpr):
    """(code - zero) scale, float32 [M, HP], of codes [M, HP] of dimensions [HP]."""
    word = tl.load(words[:, None] + (dims // GROUP * BS)[None, :], mask=inside, other=0)
    return (codes.to(tl.float32) - (word & 0xF).to(tl.float32)) * scale_of(word)


@triton.jit
def store_halves(
    out, codes, words, inside, HALF: tl.constexpr, GROUP: tl.constexpr, BS: tl.constexpr
):
    """Both nibbles of codes [M, HP] as values, to rows whose addresses are [M]."""
    i = tl.arange(0, triton.next_power_of_2(HALF))
    dtype = out.dtype.element_ty
    low = dequantised(codes & 0xF, words, i, inside, GROUP, BS)
    high = dequantised(codes >> 4, words, i + HALF, inside, GROUP, BS)
    tl.store(out[:, None] + i[None, :], low.to(dtype), mask=inside)
    tl.store(out[:, None] + HALF + i[None, :], high.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["start", "stop"])
def gather_heads(
    cache_ptr,
    blocks_ptr,
    keys_ptr,
    values_ptr,
    start,
    stop,
    block_stride,
    head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    HALF: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    BS: tl.constexpr,
    M: tl.constexpr,
):
    """keys[p - start], values[p - start] = those of positions p from start to stop, rotated.

    Programs are (M positions, KV head).

    Args:
        cache_ptr: uint8, in `CacheLayout` with columns of values.
        blocks_ptr: int32, a request's row of the block table.
        keys_ptr, values_ptr: [stop - start, heads, 2 HALF].
    """
    P: tl.constexpr = 2 * HALF
    head = tl.program_id(1)
    row = tl.program_id(0) * M + tl.arange(0, M)
    position = start + row
    real = position < stop
    block = tl.load(blocks_ptr + position // BS, mask=real, other=0).to(tl.int64)
    block = cache_ptr + block * block_stride + head * head_stride
    token = position % BS
    words = (block + BS * P).to(tl.pointer_type(tl.uint16)) + token
    i = tl.arange(0, triton.next_power_of_2(HALF))
    inside = real[:, None] & (i < HALF)[None, :]
    wide = row.to(tl.int64)
    codes = tl.load((block + token * HALF)[:, None] + i[None, :], mask=inside, other=0)
    out = keys_ptr + wide * key_stride + head * key_head_stride
    store_halves(out, codes, words, inside, HALF, KEY_GROUP, BS)
    columns = (block + BS * HALF + token)[:, None] + i[None, :] * BS
    codes = tl.load(columns, mask=inside, other=0)
    out = values_ptr + wide * value_stride + head * value_head_stride
    store_halves(out, codes, words + P // KEY_GROUP * BS, inside, HALF, VALUE_GROUP, BS)
