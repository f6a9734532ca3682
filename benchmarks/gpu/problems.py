"""What is computed: layers of language models, how their weights are quantised, how many tokens.

Sizes are those of the models' published configurations, for one GPU: merged q, k and v, and merged
gate and up projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit_kernels.code_types import CodeType
from quantkit_kernels.wna16 import QuantizedWeight

Op = Literal["linear", "add_rms_norm", "silu_mul"]

LINEAR_ROWS = (1, 16, 64, 256, 2048, 4096, 32, 128, 512, 4, 8, 2, 1024)
"""Tokens of a linear layer, those that matter most first."""

FUSED_ROWS = (4096, 16384, 1, 64, 1024)
"""Tokens of an operation that quantises its result, those that matter most first."""

FP8_BLOCK = 128
"""Rows and columns of a weight, and channels of a token, that share a scale in block FP8."""

SCALE_BYTES, ZERO_BYTES = 2, 1


@dataclass(frozen=True)
class Problem:
    """One layer of some models.

    Attributes:
        name: of the layer and the first model that has it.
        n, k: channels out and in; the same where the operation is none of a linear layer.
        op: what it does.
    """

    name: str
    n: int
    k: int
    op: Op = "linear"

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of tokens, those that matter most first."""
        return LINEAR_ROWS if self.op == "linear" else FUSED_ROWS


PROBLEMS = (
    Problem("Llama-3-8B gate_up", 28672, 4096),
    Problem("Llama-3-70B down", 8192, 28672),
    Problem("Llama-3-8B o", 4096, 4096),
    Problem("Llama-3-8B down", 4096, 14336),
    Problem("Llama-3-8B qkv", 6144, 4096),
    Problem("Llama-3-70B gate_up", 57344, 8192),
    Problem("add + RMSNorm 4096", 4096, 4096, "add_rms_norm"),
    Problem("SiLU * up 14336", 14336, 14336, "silu_mul"),
    Problem("Llama-3-70B qkv", 10240, 8192),
    Problem("Llama-3-70B o", 8192, 8192),
    Problem("Qwen3-32B gate_up", 51200, 5120),
    Problem("Qwen3-32B down", 5120, 25600),
    Problem("add + RMSNorm 8192", 8192, 8192, "add_rms_norm"),
    Problem("SiLU * up 28672", 28672, 28672, "silu_mul"),
    Problem("Qwen3-32B qkv", 10240, 5120),
    Problem("Qwen3-32B o", 5120, 8192),
    Problem("Qwen3-8B gate_up", 24576, 4096),
    Problem("Qwen3-8B down", 4096, 12288),
)
"""In the order in which they are measured; Qwen3-8B's qkv and o are Llama-3-8B's."""

SMALL = (
    Problem("small linear", 512, 512),
    Problem("small add + RMSNorm", 512, 512, "add_rms_norm"),
    Problem("small SiLU * up", 512, 512, "silu_mul"),
)
"""For trying the harness out, and for tools under which a kernel takes a thousand times longer."""


@dataclass(frozen=True)
class Kind:
    """How a weight, or the result of an operation, is quantised.

    Attributes:
        name: for tables.
        bits: of a code where it is stored.
        group_size: channels that share a scale; None where all do.
        symmetric: False where groups have zero-points.
        code_type: what a code stands for.
        block: True where as many rows of the weight share the scale.
    """

    name: str
    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    code_type: CodeType = "int"
    block: bool = False

    def random(self, n: int, k: int, generator: torch.Generator) -> QuantizedWeight:
        """A weight with normally distributed codes, on the generator's device."""
        size, device = self.group_size or k, generator.device
        index = torch.arange(k, device=device) // size
        groups = k // size
        scales = torch.rand(n, groups, generator=generator, device=device) + 0.5
        if self.block:
            scales = scales[::size].repeat_interleave(size, 0)[:n]
        bits = min(self.bits, 8)
        return QuantizedWeight(
            codes=self._codes(torch.randn(n, k, generator=generator, device=device), bits),
            scales=scales / (2**bits * k**0.5),
            zeros=self._zeros((n, groups), bits, generator),
            group_index=index.int(),
            bits=bits,
            code_type=self.code_type,
        )

    def _codes(self, values: Tensor, bits: int) -> Tensor:
        """Codes of normal `values`, which are overwritten: they may fill much of the GPU."""
        if self.code_type == "e4m3":
            return values.mul_(64).to(torch.float8_e4m3fn).view(torch.uint8)
        middle = 2 ** (bits - 1)
        spread = values.mul_(middle / 3).add_(middle)
        return spread.round_().clamp_(0, 2**bits - 1).to(torch.uint8)

    def _zeros(self, shape: tuple[int, int], bits: int, generator: torch.Generator) -> Tensor:
        middle, device = 2 ** (bits - 1), generator.device
        if self.symmetric:
            value = middle if self.code_type == "int" else 0
            return torch.full(shape, value, dtype=torch.uint8, device=device)
        low, high = middle - 2, middle + 3
        return torch.randint(
            low, high, shape, generator=generator, dtype=torch.uint8, device=device
        )

    def nbytes(self, n: int, k: int) -> float:
        """The least bytes that an n x k weight takes: codes, 16-bit scales, zero-points."""
        size = self.group_size or k
        groups = 0.0 if self.bits == 16 else n * k / size / (size if self.block else 1)
        zeros = 0 if self.symmetric else ZERO_BYTES
        return n * k * self.bits / 8 + groups * (SCALE_BYTES + zeros)


BF16 = Kind("bf16", 16)
W4 = Kind("W4A16 g128", 4, 128)
W4_G32 = Kind("W4A16 g32 asym", 4, 32, symmetric=False)
W8 = Kind("W8A16", 8)
FP8 = Kind("FP8", 8, code_type="e4m3")
BLOCK_FP8 = Kind("FP8 block", 8, FP8_BLOCK, code_type="e4m3", block=True)
INT8 = Kind("W8A8")
LLM_INT8 = Kind("LLM.int8")


def linear_bytes(kind: Kind, m: int, n: int, k: int) -> float:
    """The least bytes a linear layer moves: its weight, and 16-bit activations in and out."""
    return kind.nbytes(n, k) + 2 * m * (k + n)


def fused_bytes(op: Op, m: int, k: int) -> float:
    """The least bytes an operation that makes 8-bit rows of K channels moves.

    A norm reads x and the residual and writes their sum; SiLU reads gate and up.
    """
    return m * k * (7 if op == "add_rms_norm" else 5)


def moved_bytes(problem: Problem, kind: Kind, m: int) -> float:
    """The least bytes a call moves."""
    if problem.op == "linear":
        return linear_bytes(kind, m, problem.n, problem.k)
    return fused_bytes(problem.op, m, problem.k)


def operations(problem: Problem, m: int) -> float:
    """Multiplications and additions of the product; none are counted where there is none."""
    return 2.0 * m * problem.n * problem.k if problem.op == "linear" else 0.0
