"""Run the PTX of inline assembly in NumPy, so that it can be compared with its twins."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
"""A register of many threads."""


def assembly_of(function: object) -> list[str]:
    """The texts of inline assembly in a `triton.jit` function, in order."""
    tree = ast.parse(textwrap.dedent(function.src))  # type: ignore[attr-defined]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [call for call in calls if getattr(call.func, "attr", "") == "inline_asm_elementwise"]
    return [ast.literal_eval(call.args[0]) for call in found]


def execute(text: str, *inputs: Words) -> Words:
    """What the assembly leaves in $0, given $1, $2 and so on."""
    registers = {f"${i}": value for i, value in enumerate(inputs, 1)}
    for statement in text.strip(" {}\n").split(";"):
        name, _, operands = statement.strip(" {}\n").partition(" ")
        if name and name != ".reg":
            target, *sources = (operand.strip() for operand in operands.split(","))
            values = [_value(registers, source) for source in sources]
            registers[target] = OPERATIONS[name](*values)
    return registers["$0"]


def words(values: NDArray[np.generic]) -> Words:
    """The bits of 32-bit values."""
    return np.ascontiguousarray(values).view(np.uint32)


def floats(bits: Words) -> NDArray[np.float32]:
    """float32 of these bits."""
    return np.asarray(bits, dtype=np.uint32).view(np.float32)


def fma(
    left: NDArray[np.float32], right: NDArray[np.float32], added: NDArray[np.float32]
) -> NDArray[np.float32]:
    """left * right + added, rounded once.

    The product of two float32 is exact in float64; a sum that is not is made odd in its last bit,
    so that rounding it again is as rounding once.
    """
    product, other = left.astype(np.float64) * right, added.astype(np.float64)
    total = product + other
    rest = (product - (total - other)) + (other - (total - (total - other)))
    bits = total.view(np.int64)
    nudge = np.where((rest != 0) & (bits % 2 == 0), np.where((rest > 0) == (total > 0), 1, -1), 0)
    return (bits + nudge).view(np.float64).astype(np.float32)


def _value(registers: dict[str, Words], operand: str) -> Words:
    if match := re.fullmatch(r"0[xf](?P<digits>[0-9a-fA-F]+)", operand):
        return np.array([int(match["digits"], 16)], dtype=np.uint32)
    return registers[operand]


def _permute(left: Words, right: Words, selector: Words) -> Words:
    """Byte i of the result is byte number (selector >> 4 i) & 15 of the eight of left and right."""
    both = left.astype(np.uint64) | (right.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(both)
    for i in range(4):
        position = np.uint64(8 * ((int(selector[0]) >> 4 * i) & 7))
        result |= ((both >> position) & np.uint64(255)) << np.uint64(8 * i)
    return result.astype(np.uint32)


def _float32(operation: Callable[..., NDArray[np.float32]]) -> Callable[..., Words]:
    def run(*operands: Words) -> Words:
        with np.errstate(all="ignore"):
            return words(operation(*map(floats, operands)).astype(np.float32))

    return run


def _flush(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """0 for numbers below the smallest normal one."""
    tiny = np.finfo(np.float32).tiny
    return np.where(np.abs(values) < tiny, np.copysign(np.float32(0), values), values)


def _halves(bits: Words, is_bfloat: bool) -> NDArray[np.float64]:
    """[..., 2]: the numbers in the low and in the high half."""
    parts = np.stack([bits & np.uint32(0xFFFF), bits >> np.uint32(16)], axis=-1)
    if is_bfloat:
        return floats(parts << np.uint32(16)).astype(np.float64)
    return parts.astype(np.uint16).view(np.float16).astype(np.float64)


def _join(values: NDArray[np.float64], is_bfloat: bool) -> Words:
    """Each half rounded once, half to even."""
    if is_bfloat:
        parts = words(_round_to_bfloat(values).astype(np.float32)) >> np.uint32(16)
    else:
        parts = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return parts[..., 0] | (parts[..., 1] << np.uint32(16))


def _round_to_bfloat(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Eight bits of mantissa, fewer below 2**-126; beyond the largest, infinity."""
    exponent = np.maximum(np.frexp(values)[1], -125)
    rounded = np.ldexp(np.rint(np.ldexp(values, 8 - exponent)), exponent - 8)
    return np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, rounded), rounded)


def _fma_bf16x2(left: Words, right: Words, added: Words) -> Words:
    with np.errstate(all="ignore"):
        one, other, rest = (_halves(bits, True) for bits in (left, right, added))
        return _join(one * other + rest, True)


def _add_f16x2(left: Words, right: Words) -> Words:
    with np.errstate(all="ignore"):
        return _join(_halves(left, False) + _halves(right, False), False)


OPERATIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda value: value,
    "prmt.b32": _permute,
    "mul.f32": _float32(np.multiply),
    "mul.rn.f32": _float32(np.multiply),
    "add.f32": _float32(np.add),
    "ex2.approx.ftz.f32": _float32(lambda x: _flush(np.exp2(_flush(x)))),
    "rcp.approx.ftz.f32": _float32(lambda x: _flush(np.reciprocal(_flush(x)))),
    "fma.rn.bf16x2": _fma_bf16x2,
    "add.rn.f16x2": _add_f16x2,
}
"""Instruction to what it does; the approximate ones as exact as NumPy is."""
