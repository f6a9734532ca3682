"""LLVM IR of numbers, 16 lanes at a time: 16-bit floats and E4M3 to and from float32, and SiLU."""

from __future__ import annotations

import math
from typing import Literal

from llvmlite import ir

from quantkit_kernels.cpu.ir import (
    I32,
    LANES,
    VECTOR_F16,
    VECTOR_F32,
    VECTOR_I16,
    VECTOR_I32,
    Emitter,
    to_bf16,
)

Float = Literal["f16", "bf16", "f32"]
"""How a float lies in memory."""


STORED = {"f16": VECTOR_F16, "bf16": VECTOR_I16, "f32": VECTOR_F32}
"""What is read and written; bfloat16 is handled as its bits."""

SIZE = {"f16": 2, "bf16": 2, "f32": 4}
"""Bytes of one."""

MANGLED = {"f16": "v16f16", "bf16": "v16i16", "f32": "v16f32"}
"""LLVM's names of `STORED`."""

ROUND_TO_INTEGER = 1.5 * 2.0**23
"""float32 of this size count in ones: a sum with it is an integer, rounded half to even."""

EXP_COEFFICIENTS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
"""Taylor's, highest power first: within 6e-9 of exp(r) for |r| <= ln(2) / 2."""

LN2_HIGH, LN2_LOW = 0.693359375, math.log(2) - 0.693359375
"""ln(2) in two parts; multiples of the first below 2**15 are exact."""

EXP_LIMIT = 87.0
"""exp and its reciprocal are normal numbers up to here."""


def floats(value: float) -> ir.Constant:
    """A float32 constant in all lanes."""
    return ir.Constant(VECTOR_F32, [value] * LANES)


def bits_of(e: Emitter, value: ir.Value) -> ir.Value:
    """float32 lanes as int32."""
    return e.b.bitcast(value, VECTOR_I32)


def clamp(e: Emitter, value: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """min(max(value, low), high) of float lanes or scalars; NaN becomes low."""
    raised = e.b.select(e.b.fcmp_ordered(">", value, low), value, low)
    return e.b.select(e.b.fcmp_ordered("<", raised, high), raised, high)


def lanes_below(e: Emitter, count: ir.Value) -> ir.Value:
    """The mask of the first `count` lanes."""
    lanes = ir.Constant(VECTOR_I32, list(range(LANES)))
    return e.b.icmp_signed("<", lanes, e.splat(e.b.trunc(count, I32)))


def load_floats(
    e: Emitter, kind: Float, address: ir.Value, mask: ir.Value | None = None
) -> ir.Value:
    """16 floats of memory as float32; 0 in lanes outside the mask, whose memory is not read."""
    stored = STORED[kind]
    if mask is None:
        value = e.load(stored, address, align=SIZE[kind])
    else:
        pointer = e.b.inttoptr(address, stored.as_pointer())
        alignment, zero = ir.Constant(I32, SIZE[kind]), ir.Constant(stored, None)
        name = f"llvm.masked.load.{MANGLED[kind]}.p0{MANGLED[kind]}"
        value = e.call(name, stored, pointer, alignment, mask, zero)
    return widen(e, kind, value)


def store_floats(
    e: Emitter, kind: Float, value: ir.Value, address: ir.Value, mask: ir.Value | None = None
) -> None:
    """Write what `narrow` made; memory of lanes outside the mask stays as it is."""
    if mask is None:
        e.store(value, address, align=SIZE[kind])
        return
    pointer = e.b.inttoptr(address, STORED[kind].as_pointer())
    name = f"llvm.masked.store.{MANGLED[kind]}.p0{MANGLED[kind]}"
    e.call(name, ir.VoidType(), value, pointer, ir.Constant(I32, SIZE[kind]), mask)


def widen(e: Emitter, kind: Float, value: ir.Value) -> ir.Value:
    """`STORED[kind]` to float32, exactly."""
    if kind == "f16":
        return e.b.fpext(value, VECTOR_F32)
    if kind == "bf16":
        return e.b.bitcast(e.b.shl(e.b.zext(value, VECTOR_I32), e.words(16)), VECTOR_F32)
    return value


def narrow(e: Emitter, kind: Float, value: ir.Value) -> ir.Value:
    """float32 to `STORED[kind]`, half to even; NaN stays NaN."""
    if kind == "f16":
        return e.b.fptrunc(value, VECTOR_F16)
    return to_bf16(e, value) if kind == "bf16" else value


def low_bits(e: Emitter, value: ir.Value) -> ir.Value:
    """int32 whose lowest 22 bits are those of rint(value), half to even, for |value| < 2**21."""
    return bits_of(e, e.b.fadd(value, floats(ROUND_TO_INTEGER)))


def to_integer(e: Emitter, value: ir.Value) -> ir.Value:
    """rint(value) as int32, half to even, for |value| < 2**21."""
    return e.b.sub(low_bits(e, value), bits_of(e, floats(ROUND_TO_INTEGER)))


def to_e4m3(e: Emitter, value: ir.Value) -> ir.Value:
    """The bits of the nearest E4M3 as int32, for |value| <= 448, half to even.

    E4M3 counts in steps of 2**(E - 3), with E the exponent of the value, at least -6. float32 of
    the size of 2**(E + 20) counts in the same: the sum with that number is rounded to steps, and
    its lowest bits are their number n. The code is 8 (E + 6) + n.
    """
    b, bits = e.b, bits_of(e, value)
    magnitude = b.and_(bits, e.words(0x7FFFFFFF))
    exponent = b.and_(magnitude, e.words(0x7F800000))
    exponent = e.call("llvm.smax.v16i32", VECTOR_I32, exponent, bits_of(e, floats(2.0**-6)))
    ones = b.add(exponent, e.words(20 << 23))
    total = b.fadd(b.bitcast(magnitude, VECTOR_F32), b.bitcast(ones, VECTOR_F32))
    steps = b.sub(bits_of(e, total), ones)
    code = b.add(steps, b.sub(b.lshr(exponent, e.words(20)), e.words((127 - 6) << 3)))
    return b.or_(code, b.and_(b.lshr(bits, e.words(24)), e.words(0x80)))


def silu(e: Emitter, x: ir.Value) -> ir.Value:
    """x / (1 + exp(-x)); NaN stays NaN, and -infinity stays -infinity."""
    return e.b.fdiv(x, e.b.fadd(floats(1.0), _exp(e, e.b.fneg(x))))


def _exp(e: Emitter, x: ir.Value) -> ir.Value:
    """exp(x), |x| cut to 87: 2**n exp(r) with x = n ln(2) + r."""
    x = clamp(e, x, floats(-EXP_LIMIT), floats(EXP_LIMIT))
    n = to_integer(e, e.b.fmul(x, floats(1 / math.log(2))))
    power = e.b.sitofp(n, VECTOR_F32)
    r = e.fma(power, floats(-LN2_LOW), e.fma(power, floats(-LN2_HIGH), x))
    result = floats(EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        result = e.fma(result, r, floats(coefficient))
    shifted = e.b.add(bits_of(e, result), e.b.shl(n, e.words(23)))
    return e.b.bitcast(shifted, VECTOR_F32)
