"""Integers to pairs of 16-bit floats: every code, every zero-point, assembly and plain Triton."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from quantkit_kernels.wna16.cuda_layout import pack_scales
from quantkit_kernels.wna16.triton_dequantise import value_pair
from quantkit_kernels.wna16.triton_pairs import pair_bits
from quantkit_kernels.wna16.triton_unpack import unpack
from tests.kernels.interpreted import (
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)

SCALE = 0.375


@interpreter
@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@triton.jit
def value_pairs(
    words_ptr,
    scales_ptr,
    out_ptr,
    BITS: tl.constexpr,
    BF16: tl.constexpr,
    ZERO: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """scale * (code - zero) in pairs, in plain Triton and in assembly: int32 [2, pairs, size]."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    offsets = rows[:, None] * (4 * BITS) + tl.arange(0, 4 * BITS)[None, :]
    words = tl.load(words_ptr + offsets)
    groups = (tl.load(scales_ptr + rows)[:, None],)
    size = tl.num_programs(0) * BN * 4 * BITS
    for ASM in tl.static_range(2):
        pairs = unpack(words, BITS, BF16, ASM)
        for i in tl.static_range(16 // BITS):
            value = value_pair(
                pairs[i], groups, i, BITS, "int", BN, 128, ZERO, True, 1.0, BF16, ASM
            )
            tl.store(out_ptr + (ASM * (16 // BITS) + i) * size + offsets, value)


def emulate(asm: tl.constexpr, constraints: str, args: list, *_: object, **__: object) -> tl.tensor:
    """What the GPU computes for one of our one-instruction assembly strings."""
    shape = next(arg.handle.data.shape for arg in args if isinstance(arg, tl.tensor))
    operands = [
        torch.from_numpy(arg.handle.data.copy())
        if isinstance(arg, tl.tensor)
        else torch.full(shape, getattr(arg, "value", arg), dtype=torch.int32)
        for arg in args
    ]
    name, *_, last = str(getattr(asm, "value", asm)).strip(";").split()
    operation = INSTRUCTIONS[name]
    if last.startswith("0x"):
        operation = partial(operation, int(last, 16))
    result = operation(*operands).numpy()
    return tl.tensor(TensorHandle(result, tl.int32), tl.block_type(tl.int32, list(shape)))


def lop3(table: int, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Bit i of the result is bit 4 a + 2 b + c of the table, of the bits i of the operands."""
    result = torch.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            chosen = (
                operand if index & bit else ~operand for operand, bit in ((a, 4), (b, 2), (c, 1))
            )
            first, second, third = chosen
            result |= first & second & third
    return result


def prmt(selector: int, a: Tensor, b: Tensor) -> Tensor:
    """Byte i of the result is byte s of (b, a), s being nibble i of the selector."""
    both = (a.long() & 0xFFFFFFFF) | b.long() << 32
    result = torch.zeros_like(both)
    for i in range(4):
        result |= (both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i
    return torch.where(result >= 1 << 31, result - (1 << 32), result).int()


def fma(dtype: torch.dtype, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fma.rn.*x2: a * b + c in each half, rounded once; float64 holds the exact value."""
    x, y, z = (t.contiguous().view(dtype).double() for t in (a, b, c))
    return (x * y + z).to(dtype).view(torch.int32)


INSTRUCTIONS = {
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "fma.rn.bf16x2": partial(fma, torch.bfloat16),
    "fma.rn.f16x2": partial(fma, torch.float16),
    "cvt.rn.bf16x2.f32": lambda a: a.bfloat16().repeat_interleave(2, -1).view(torch.int32),
    "cvt.rn.f16x2.f32": lambda a: a.half().repeat_interleave(2, -1).view(torch.int32),
}


@interpreter
@in_interpreter
@pytest.mark.parametrize("shared", [True, False], ids=["one zero", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_code_with_every_zero(
    bits: int, dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tl, "inline_asm_elementwise", emulate)
    zero = 2 ** (bits - 1) if shared else None
    zeros = torch.tensor([zero]) if shared else torch.arange(min(2**bits + 1, 256))
    # Every position of a word holds the same byte, so its codes repeat.
    stored = torch.arange(256).repeat(len(zeros)).view(-1, 4 * bits)
    words = stored * 0x01010101
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    zeros = zeros.repeat_interleave(len(words) // len(zeros))[:, None]
    scales = pack_scales(torch.full((len(words), 1), SCALE), zeros, 128)
    out = torch.empty(2, 16 // bits, *words.shape, dtype=torch.int32)
    rows = 256 if len(words) % 256 == 0 else 64 // bits
    grid = (len(words) // rows,)
    value_pairs[grid](words, scales, out, bits, dtype == torch.bfloat16, zero, rows)
    plain, assembly = out.view(dtype).unflatten(-1, (-1, 2)).float()
    assert torch.equal(plain, assembly)
    for pair, values in enumerate(assembly):
        codes = stored >> bits * pair % 8 & 2**bits - 1
        expected = ((codes - zeros) * SCALE).to(dtype).float()
        assert torch.equal(values, expected[..., None].expand(-1, -1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.0, -136.0, 0.015625, -1152.0, 255.0])
def test_pair_bits(value: float, dtype: torch.dtype) -> None:
    word = torch.tensor([pair_bits(value, dtype == torch.bfloat16)], dtype=torch.int32)
    assert word.view(dtype).tolist() == [value, value]
