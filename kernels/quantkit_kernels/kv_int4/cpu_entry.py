"""What the CPU kernels share: entries that draw tasks, folds over lanes, powers of two, words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

from quantkit_kernels.act_quant.cpu_math import ROUND_TO_INTEGER, bits_of, floats
from quantkit_kernels.cpu.ir import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    VECTOR_F16,
    VECTOR_F32,
    VECTOR_I8,
    VECTOR_I16,
    VECTOR_I32,
    Emitter,
)

VECTOR_BYTES = 4 * LANES
"""Bytes of a vector of float32."""

EXP2_COEFFICIENTS = tuple(math.log(2) ** k / math.factorial(k) for k in range(7, -1, -1))
"""Taylor's, highest power first: within 6e-9 of 2**r for |r| <= 1 / 2."""

SMALLEST_POWER, LARGEST_POWER = -126.0, 127.0


class Entry:
    """Emits `name(arguments, ...)`, whose argument block holds int64 `fields`.

    Attributes:
        e: the emitter.
        a: fields by name, but for those in `counters`.
    """

    def __init__(
        self,
        module: ir.Module,
        name: str,
        fields: Sequence[str],
        counters: Sequence[str],
        arguments: int = 1,
    ) -> None:
        self.e, self.fields = Emitter(module, name, arguments), fields
        self.a = {
            field: self.e.load(I64, self.e.args[0], 8 * i, align=8)
            for i, field in enumerate(fields)
            if field not in counters
        }

    def draw(self, counter: str) -> ir.Value:
        """counter++, atomically."""
        address = self.e.b.add(self.e.args[0], self.e.number(8 * self.fields.index(counter)))
        pointer = self.e.b.inttoptr(address, I64.as_pointer())
        return self.e.b.atomic_rmw("add", pointer, self.e.number(1), "monotonic")

    @contextmanager
    def tasks(self, counter: str, stop: ir.Value) -> Iterator[ir.Value]:
        """while (index = counter++) < stop, then return; the counter is shared by threads."""
        e, b = self.e, self.e.b
        head, body, done = (e.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        index = self.draw(counter)
        b.cbranch(e.less(index, stop), body, done)
        b.position_at_end(body)
        yield index
        b.branch(head)
        b.position_at_end(done)
        b.ret_void()


def stack(e: Emitter, bytes_: int) -> ir.Value:
    """The address of memory on the stack, at a multiple of 64; for an entry's first block only."""
    space = e.b.alloca(VECTOR_F32, -(-bytes_ // VECTOR_BYTES))
    space.align = VECTOR_BYTES
    return e.b.ptrtoint(space, I64)


def divided(e: Emitter, index: ir.Value, by: ir.Value | int) -> tuple[ir.Value, ir.Value]:
    """index // by and index % by, neither negative."""
    divisor = e.number(by) if isinstance(by, int) else by
    quotient = e.b.udiv(index, divisor)
    return quotient, e.b.sub(index, e.b.mul(quotient, divisor))


def ceiling(e: Emitter, count: ir.Value, by: int) -> ir.Value:
    """ceil(count / by) of a count that is not negative."""
    return e.b.udiv(e.b.add(count, e.number(by - 1)), e.number(by))


def load_i32(e: Emitter, address: ir.Value, offset: int = 0) -> ir.Value:
    """An int32 of memory as int64."""
    return e.b.sext(e.load(I32, address, offset), I64)


def broadcast(e: Emitter, address: ir.Value, offset: int = 0, kind: ir.Type = F32) -> ir.Value:
    """A number of memory in all lanes."""
    return e.splat(e.load(kind, address, offset))


def larger(e: Emitter, left: ir.Value, right: ir.Value) -> ir.Value:
    """left where left > right, else right; not that where left is NaN."""
    return e.b.select(e.b.fcmp_ordered(">", left, right), left, right)


def smaller(e: Emitter, left: ir.Value, right: ir.Value) -> ir.Value:
    """left where left < right, else right."""
    return e.b.select(e.b.fcmp_ordered("<", left, right), left, right)


def permuted(e: Emitter, value: ir.Value, order: Sequence[int]) -> ir.Value:
    """value[order[lane]] in each lane."""
    return e.b.shuffle_vector(value, value, ir.Constant(VECTOR_I32, list(order)))


def folded(e: Emitter, value: ir.Value, join: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """All lanes joined, in all lanes."""
    for step in (8, 4, 2, 1):
        value = join(value, permuted(e, value, [lane ^ step for lane in range(LANES)]))
    return value


def first_lane(e: Emitter, value: ir.Value) -> ir.Value:
    """The scalar in lane 0."""
    return e.b.extract_element(value, ir.Constant(I32, 0))


def exp2(e: Emitter, x: ir.Value) -> ir.Value:
    """2**x, x cut to the powers of normal numbers; NaN stays NaN."""
    b = e.b
    x = b.select(b.fcmp_ordered("<", x, floats(SMALLEST_POWER)), floats(SMALLEST_POWER), x)
    x = b.select(b.fcmp_ordered(">", x, floats(LARGEST_POWER)), floats(LARGEST_POWER), x)
    shifted = b.fadd(x, floats(ROUND_TO_INTEGER))
    rest = b.fsub(x, b.fsub(shifted, floats(ROUND_TO_INTEGER)))
    result = floats(EXP2_COEFFICIENTS[0])
    for coefficient in EXP2_COEFFICIENTS[1:]:
        result = e.fma(result, rest, floats(coefficient))
    # Above ROUND_TO_INTEGER's own bits, which the shift drops but for this exponent of one.
    power = b.shl(b.add(bits_of(e, shifted), e.words(127)), e.words(23))
    return b.fmul(result, b.bitcast(power, VECTOR_F32))


def tanh(e: Emitter, x: ir.Value) -> ir.Value:
    """1 - 2 / (exp(2 x) + 1)."""
    power = exp2(e, e.b.fmul(x, floats(2 / math.log(2))))
    return e.b.fsub(floats(1.0), e.b.fdiv(floats(2.0), e.b.fadd(power, floats(1.0))))


def decoded(e: Emitter, address: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Scales and zero-points, float32, of 16 words."""
    words = e.load(VECTOR_I16, address, align=2)
    return _scale(e, words), _zero(e, words)


def decoded_one(e: Emitter, address: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Scale and zero-point of one word, in all lanes."""
    words = e.splat(e.load(I16, address, align=2))
    return _scale(e, words), _zero(e, words)


def nibbles(e: Emitter, address: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Low and high codes, float32, of 16 bytes."""
    wide = e.b.zext(e.load(VECTOR_I8, address, align=1), VECTOR_I32)
    low, high = e.b.and_(wide, e.words(15)), e.b.lshr(wide, e.words(4))
    return e.b.sitofp(low, VECTOR_F32), e.b.sitofp(high, VECTOR_F32)


def _scale(e: Emitter, words: ir.Value) -> ir.Value:
    bits = e.b.and_(words, ir.Constant(VECTOR_I16, [-16] * LANES))
    return e.b.fpext(e.b.bitcast(bits, VECTOR_F16), VECTOR_F32)


def _zero(e: Emitter, words: ir.Value) -> ir.Value:
    zero = e.b.and_(words, ir.Constant(VECTOR_I16, [15] * LANES))
    return e.b.sitofp(e.b.zext(zero, VECTOR_I32), VECTOR_F32)
