"""Integer weights to test kernels with, and how far a kernel may be from the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.code_types import FLOAT8_DTYPES, CodeType, code_values
from quantkit_kernels.wna16 import QuantizedWeight, reference_linear

MAX_ERROR = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 2e-6}
"""Frobenius norm of the error over that of y, by dtype of y.

bfloat16: y rounded to 8 bits, 1.7e-3. float16: y rounded to 11 bits, 2.1e-4. float32: sums in
another order than the reference's. Weights and scales are never rounded.
"""


BITS: dict[CodeType, int] = {"e4m3": 8, "e5m2": 8, "nf4": 4, "fp4": 4}
"""Width of the codes that are not integers."""


def random_weight(
    out_features: int,
    in_features: int,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    act_order: bool = False,
    code_type: CodeType = "int",
    seed: int = 0,
) -> QuantizedWeight:
    """A weight whose last group may be short, with zero-points up to the 2**bits GPTQ can store.

    Codes of 8-bit floats are those of finite numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)
    index = torch.arange(in_features) // group_size
    zeros = torch.randint(
        0, min(2**bits + 1, 256), (out_features, groups), dtype=torch.uint8, generator=generator
    )
    codes = torch.randint(
        0, 2**bits, (out_features, in_features), dtype=torch.uint8, generator=generator
    )
    if code_type in FLOAT8_DTYPES:
        codes = codes.where(code_values(code_type).isfinite()[codes.long()], codes & 0x8F)
    return QuantizedWeight(
        codes=codes,
        scales=torch.rand(out_features, groups, generator=generator) * 0.02 + 1e-3,
        zeros=torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        group_index=(
            index[torch.randperm(in_features, generator=generator)] if act_order else index
        ).int(),
        bits=bits,
        code_type=code_type,
    )


def random_inputs(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Normal values with a few channels fifty times larger, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x[..., ::61] *= 50
    return x.to(dtype)


def relative_error(
    y: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None
) -> float:
    """Norm of y - reference over the norm of the reference."""
    expected = reference_linear(x, weight, bias)
    assert y.shape == expected.shape
    return float((y.float() - expected).norm() / expected.norm())
