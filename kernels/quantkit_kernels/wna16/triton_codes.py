# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton: codes that are no integers to pairs of 16-bit floats, in the order of `triton_unpack`.

8-bit floats become 16-bit ones by moving bits: sign to sign, exponent and mantissa next to each
other. What the exponents' biases differ by is a power of two, which a product corrects exactly,
subnormal numbers included. So GPUs without FP8 serve them too. NaN and infinities, which weights
do not contain, become finite.

Code books are looked up by byte permutes, four codes at a time, from tables in the instructions.
"""

from itertools import product

import torch
import triton
import triton.language as tl

from quantkit_kernels.code_types import CODE_BOOKS
from quantkit_kernels.wna16.triton_pairs import and_or, mul_pair

_LOOK_UP = """{{
.reg .b32 s, t, u, m, x, y, a, b, c, d;
and.b32 t, $4, 0x77777777;
shl.b32 u, $4, 4;
prmt.b32 s, t, t, 0x2020;
prmt.b32 m, u, $4, 0xeac8;
{first_half}
prmt.b32 s, t, t, 0x3131;
prmt.b32 m, u, $4, 0xfbd9;
{second_half}
prmt.b32 $0, a, b, 0x6240;
prmt.b32 $1, a, b, 0x7351;
prmt.b32 $2, c, d, 0x6240;
prmt.b32 $3, c, d, 0x7351;
}}"""
"""s: codes without their highest bits, which select the half of a table; m: 0xff in each byte
whose code has that bit. a, b: low and high bytes of codes 0, 1, 4, 5; c, d: of 2, 3, 6, 7."""

_LOOK_UP_BYTES = """prmt.b32 x, {0:#x}, {1:#x}, s;
prmt.b32 y, {2:#x}, {3:#x}, s;
lop3.b32 {name}, m, y, x, 0xca;"""

_LOOK_UP_LOW_BYTES = "prmt.b32 {name}, {0:#x}, {1:#x}, s;"
_LOOK_UP_SIGNED_BYTES = """prmt.b32 x, {0:#x}, {1:#x}, s;
lop3.b32 {name}, m, 0x80808080, x, 0xea;"""
"""The same where the highest bit of a code is the sign of its value: low and high bytes."""


def _book_bits(code: str, dtype: torch.dtype, residual: bool) -> tuple[int, ...]:
    values = torch.tensor(CODE_BOOKS[code], dtype=torch.float32)
    rounded = values.to(dtype)
    chosen = (values - rounded.float()).to(dtype) if residual else rounded
    return tuple(bits & 0xFFFF for bits in chosen.view(torch.int16).tolist())


def _look_up_asm(bits: tuple[int, ...]) -> str:
    low, high = (bytes(b >> shift & 0xFF for b in bits) for shift in (0, 8))
    words = [
        [int.from_bytes(half[i : i + 4], "little") for i in (0, 4, 8, 12)] for half in (low, high)
    ]
    signed = all(bits[i + 8] == bits[i] ^ 0x8000 for i in range(8))
    lines = (_LOOK_UP_LOW_BYTES, _LOOK_UP_SIGNED_BYTES) if signed else (_LOOK_UP_BYTES,) * 2
    halves = [
        "\n".join(lines[i].format(*words[i], name=names[i]) for i in (0, 1))
        for names in ("ab", "cd")
    ]
    return _LOOK_UP.format(first_half=halves[0], second_half=halves[1])


# Functions that kernels call may read tables, but not call Torch.
_BITS = {
    (code, dtype == torch.bfloat16, residual): _book_bits(code, dtype, residual)
    for code, dtype, residual in product(CODE_BOOKS, (torch.bfloat16, torch.float16), (False, True))
}
_ASM = {key: _look_up_asm(bits) for key, bits in _BITS.items()}


@triton.constexpr_function
def book_bits(code: str, bf16: bool, residual: bool) -> tuple[int, ...]:
    """The 16 values of a code book as the bits of 16-bit floats.

    residual: instead, what rounding to 16 bits took from the values.
    """
    return _BITS[code, bf16, residual]


@triton.constexpr_function
def look_up_asm(code: str, bf16: bool, residual: bool) -> str:
    """Assembly from a word of 8 codes, $4, to the pairs $0 .. $3."""
    return _ASM[code, bf16, residual]


@triton.constexpr_function
def float8_power(code: str, bf16: bool) -> int:
    """Bits of the 16-bit float 2**p by which the pairs of `float8_pair` are too small."""
    if bf16:
        return {"e4m3": 0x7B80, "e5m2": 0x7780}[code]  # 127 - 7, 127 - 15
    return {"e4m3": 0x5C00, "e5m2": 0x3C00}[code]  # 15 - 7, 0


@triton.jit
def book_value(codes, BITS: tl.constexpr):
    """BITS[code] for each of `codes`; interpreter only."""
    found = tl.zeros_like(codes)
    for code in tl.static_range(16):
        found = tl.where(codes == code, BITS[code], found)
    return found


@triton.jit
def book_pair(words, FIRST: tl.constexpr, BITS: tl.constexpr):
    """Pair of the codes FIRST and FIRST + 4 of each word; interpreter only."""
    low = book_value((words >> 4 * FIRST) & 15, BITS)
    high = book_value((words >> 4 * FIRST + 16) & 15, BITS)
    return low | (high << 16)


@triton.jit
def look_up(
    words, CODE: tl.constexpr, BF16: tl.constexpr, RESIDUAL: tl.constexpr, ASM: tl.constexpr
):
    """Pairs of a code book's values: columns +0, +16, +8 and +24 of each word, as of `unpack4`."""
    if ASM:
        TEXT: tl.constexpr = look_up_asm(CODE, BF16, RESIDUAL)
        return tl.inline_asm_elementwise(
            TEXT, "=r,=r,=r,=r,r", [words], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1
        )
    else:
        BITS: tl.constexpr = book_bits(CODE, BF16, RESIDUAL)
        return (
            book_pair(words, 0, BITS),
            book_pair(words, 1, BITS),
            book_pair(words, 2, BITS),
            book_pair(words, 3, BITS),
        )


@triton.jit
def float8_pair(words, CODE: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """Pair of the even bytes' values over 2**p, see `float8_power`."""
    if CODE == "e5m2" and not BF16:
        return (words & 0x00FF00FF) << 8
    else:
        MANTISSA: tl.constexpr = 3 if CODE == "e4m3" else 2
        SHIFT: tl.constexpr = (7 if BF16 else 10) - MANTISSA
        magnitude = (words & 0x007F007F) << SHIFT
        return and_or(words << 8, -0x7FFF8000, magnitude, ASM)  # 0x80008000


@triton.jit
def unpack_float8(
    words, CODE: tl.constexpr, BF16: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr
):
    """Pairs of 8-bit floats: columns +0 and +8 of each word; over 2**p if not EXACT."""
    even = float8_pair(words, CODE, BF16, ASM)
    odd = float8_pair(words >> 8, CODE, BF16, ASM)
    POWER: tl.constexpr = float8_power(CODE, BF16)
    if EXACT and POWER != 0x3C00:
        power = tl.full(words.shape, POWER * 0x10001, tl.int32)
        even = mul_pair(even, power, BF16, ASM)
        odd = mul_pair(odd, power, BF16, ASM)
    return even, odd
