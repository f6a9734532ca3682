"""A thin layer over llvmlite's builder: byte addresses as int64, counted loops, 16-lane vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

LANES = 16

I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
F32 = ir.FloatType()
VECTOR_F16 = ir.VectorType(ir.HalfType(), LANES)
VECTOR_I8, VECTOR_I16, VECTOR_I32, VECTOR_F32 = (
    ir.VectorType(lane, LANES) for lane in (I8, I16, I32, F32)
)


@dataclass
class Loop:
    """One `for`: its index, the values carried round it, and what they become.

    Attributes:
        index: int64.
        values: carried values at the head of an iteration; after the loop, the final ones.
        next_values: what the body leaves for the next iteration; as many as `values`.
    """

    index: ir.Value
    values: Sequence[ir.Value]
    next_values: Sequence[ir.Value]


class Emitter:
    """Emits one function of int64 arguments; addresses, strides and offsets count bytes.

    Attributes:
        function: what is being emitted.
        args: its arguments.
        b: llvmlite's builder, at the place where the next instruction goes.
    """

    def __init__(self, module: ir.Module, name: str, arguments: int) -> None:
        kind = ir.FunctionType(ir.VoidType(), [I64] * arguments)
        self.function = ir.Function(module, kind, name)
        self.args: Sequence[ir.Value] = self.function.args
        self.b = ir.IRBuilder(self.function.append_basic_block())

    def number(self, value: int) -> ir.Constant:
        """An int64 constant."""
        return ir.Constant(I64, value)

    def words(self, value: int) -> ir.Constant:
        """An int32 constant in all lanes."""
        return ir.Constant(VECTOR_I32, [value] * LANES)

    def at(self, base: ir.Value, *terms: tuple[ir.Value, ir.Value | int]) -> ir.Value:
        """base + sum(index * stride)."""
        for index, stride in terms:
            step = self.number(stride) if isinstance(stride, int) else stride
            base = self.b.add(base, self.b.mul(index, step))
        return base

    def load(self, kind: ir.Type, address: ir.Value, offset: int = 0, align: int = 4) -> ir.Value:
        """The value of type `kind` at address + offset."""
        return self.b.load(self._pointer(kind, address, offset), align=align)

    def store(self, value: ir.Value, address: ir.Value, offset: int = 0, align: int = 4) -> None:
        """Write `value` at address + offset."""
        self.b.store(value, self._pointer(value.type, address, offset), align=align)

    def prefetch(self, address: ir.Value, offset: int = 0, level: int = 1) -> None:
        """Ask for a cache line, into the cache of a level; the address need not be valid."""
        pointer = self._pointer(I8, address, offset)
        read_keep_data = [ir.Constant(I32, value) for value in (0, 4 - level, 1)]
        self.call("llvm.prefetch.p0i8", ir.VoidType(), pointer, *read_keep_data)

    def splat(self, scalar: ir.Value) -> ir.Value:
        """The scalar in all lanes."""
        undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
        single = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(single, undefined, self.words(0))

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x * y + z in every lane, rounded once where the CPU can."""
        return self.call("llvm.fmuladd.v16f32", VECTOR_F32, x, y, z)

    def call(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        """Call the LLVM intrinsic `name`."""
        module = self.function.module
        known = module.globals.get(name)
        kind = ir.FunctionType(result, [argument.type for argument in args])
        return self.b.call(known or ir.Function(module, kind, name), args)

    def gather_constants(self, name: str, values: Sequence[float], index: ir.Value) -> ir.Value:
        """values[index] as float32, from a constant of the module called `name`."""
        module = self.function.module
        table = module.globals.get(name)
        if table is None:
            kind = ir.ArrayType(F32, len(values))
            table = ir.GlobalVariable(module, kind, name)
            table.global_constant = True
            table.initializer = ir.Constant(kind, list(values))
        start, found = self.b.ptrtoint(table, I64), ir.Constant(VECTOR_F32, ir.Undefined)
        for lane in (ir.Constant(I32, i) for i in range(LANES)):
            position = self.b.zext(self.b.extract_element(index, lane), I64)
            value = self.load(F32, self.at(start, (position, 4)))
            found = self.b.insert_element(found, value, lane)
        return found

    def less(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """left < right."""
        return self.b.icmp_signed("<", left, right)

    def is_null(self, address: ir.Value) -> ir.Value:
        """address == 0."""
        return self.b.icmp_signed("==", address, self.number(0))

    def minimum(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """The smaller of two int64."""
        return self.b.select(self.less(left, right), left, right)

    def maximum(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """The larger of two int64."""
        return self.b.select(self.less(left, right), right, left)

    @contextmanager
    def loop(self, stop: ir.Value, values: Sequence[ir.Value] = ()) -> Iterator[Loop]:
        """for (index = 0; index < stop; index++), carrying `values` round."""
        b, before = self.b, self.b.block
        head, body, done = (self.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        index, carried = b.phi(I64), [b.phi(value.type) for value in values]
        b.cbranch(self.less(index, stop), body, done)
        b.position_at_end(body)
        state = Loop(index, carried, carried)
        yield state
        advanced = b.add(index, self.number(1))
        firsts, followings = [self.number(0), *values], [advanced, *state.next_values]
        for phi, first, following in zip([index, *carried], firsts, followings, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(following, b.block)
        b.branch(head)
        b.position_at_end(done)

    def _pointer(self, kind: ir.Type, address: ir.Value, offset: int) -> ir.Value:
        if offset:
            address = self.b.add(address, self.number(offset))
        return self.b.inttoptr(address, kind.as_pointer())


def to_bf16(e: Emitter, value: ir.Value) -> ir.Value:
    """The bits of the nearest bfloat16, half to even; NaN stays NaN."""
    bits = e.b.bitcast(value, VECTOR_I32)
    odd = e.b.and_(e.b.lshr(bits, e.words(16)), e.words(1))
    rounded = e.b.lshr(e.b.add(bits, e.b.add(odd, e.words(0x7FFF))), e.words(16))
    is_nan = e.b.fcmp_unordered("uno", value, value)
    return e.b.trunc(e.b.select(is_nan, e.words(0x7FC0), rounded), VECTOR_I16)
