"""The assembly that unpacks the 4-bit cache, its integer instructions carried out by torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import triton_codes as codes

BASES = {torch.bfloat16: 128, torch.float16: 1024}
"""What nibbles are added to."""


def execute(asm: str, *operands: Tensor) -> list[Tensor]:
    """What one of our assembly strings leaves in its operands, as int64 of 32 bits."""
    registers = {f"${i}": value for i, value in enumerate(operands)}
    for line in asm.replace("{", "").replace("}", "").split(";"):
        name, _, rest = line.strip().partition(" ")
        words = [word.strip() for word in rest.split(",")]
        if not name or name == ".reg":
            continue
        to, *sources = words
        if name == "mov.b32":  # {low, high}, pair
            first, second, pair = words
            registers[first], registers[second] = registers[pair] & 0xFFFF, registers[pair] >> 16
            continue
        values = [registers[w] if w in registers else torch.tensor(int(w, 0)) for w in sources]
        registers[to] = OPERATIONS[name](*values) & 0xFFFFFFFF
    return list(registers.values())


def permute(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """prmt.b32: each nibble of the selector picks one of eight bytes."""
    both = [a >> 8 * i & 0xFF for i in range(4)] + [b >> 8 * i & 0xFF for i in range(4)]
    return sum(both[int(selector) >> 4 * i & 7] << 8 * i for i in range(4))


def widened(half: Tensor) -> Tensor:
    """cvt.f32.f16."""
    return half.to(torch.int16).view(torch.float16).float().view(torch.int32).long()


OPERATIONS = {
    "prmt.b32": permute,
    "lop3.b32": lambda a, b, c, _: (a & b) | c,  # 0xEA: bit i is set where (a & b) | c
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "and.b32": lambda a, b: a & b,
    "cvt.f32.f16": widened,
}


def random_words(*shape: int) -> Tensor:
    """int64 of 32 random bits."""
    return torch.randint(0, 1 << 32, shape)


def floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def run(asm: Any, results: int, *operands: Tensor) -> list[Tensor]:
    return execute(asm.value, *(torch.empty(0),) * results, *operands)[:results]


@pytest.mark.parametrize(("asm", "dtype"), [
    (codes.BF16_NIBBLES_ASM, torch.bfloat16), (codes.FP16_NIBBLES_ASM, torch.float16),
])  # fmt: skip
def test_nibbles_of_bytes(asm: Any, dtype: torch.dtype) -> None:
    packed = torch.randint(0, 256, (1000, 4), dtype=torch.uint8)
    word = packed.view(torch.int32).squeeze(1).long() & 0xFFFFFFFF
    pairs = torch.stack(run(asm, 4, word), -1).to(torch.int32).view(dtype).float()  # [1000, 8]
    expected = torch.cat((packed & 15, packed >> 4), -1).float() + BASES[dtype]
    assert torch.equal(pairs, expected)


@pytest.mark.parametrize(("asm", "dtype"), [
    (codes.BF16_PAIRS_ASM, torch.bfloat16), (codes.FP16_PAIRS_ASM, torch.float16),
])  # fmt: skip
def test_nibbles_of_pairs_of_bytes(asm: Any, dtype: torch.dtype) -> None:
    word = random_words(1000)
    for i, result in enumerate(run(asm, 4, word)):
        pair = result.to(torch.int32)[:, None].view(dtype).float()  # [1000, 2]
        nibbles = torch.stack((word >> 4 * i & 15, word >> 16 + 4 * i & 15), -1)
        assert torch.equal(pair, nibbles.float() + BASES[dtype])


def test_scales_of_two_words() -> None:
    word = random_words(1000) & 0x7BFF7BFF  # finite
    for i, scale in enumerate(run(codes.SCALES_ASM, 2, word)):
        half = (word >> 16 * i & 0xFFF0).to(torch.int16).view(torch.float16)
        assert torch.equal(floats(scale), half.float())


@pytest.mark.parametrize(("asm", "dtype"), [
    (codes.BF16_ZEROS_ASM, torch.bfloat16), (codes.FP16_ZEROS_ASM, torch.float16),
])  # fmt: skip
def test_zero_points_of_two_words(asm: Any, dtype: torch.dtype) -> None:
    word = random_words(1000)
    for i, zero in enumerate(run(asm, 2, word)):
        assert torch.equal(floats(zero), (word >> 16 * i & 15).float() + BASES[dtype])


def test_zero_points_of_two_pairs_of_words() -> None:
    words = random_words(2, 1000)
    for i, result in enumerate(run(codes.ZERO_PAIRS_ASM, 2, *words)):
        pair = result.to(torch.int32)[:, None].view(torch.bfloat16).float()
        assert torch.equal(pair, (words >> 16 * i & 15).float().T + 128)
