"""The arithmetic of the activation kernel: inline assembly against its twins, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit_kernels.act_quant import triton_math
from tests.kernels.ptx import assembly_of, execute, floats, fma, words

RANDOM = np.random.default_rng(0)
MANTISSAS = np.unique(
    np.concatenate([RANDOM.integers(0, 2**23, 2**17), [0, 1, 2**22, 2**23 - 3, 2**23 - 2]])
)
"""Bits behind the leading one: all that matters to a division far from under- and overflow."""

NUMBERS = floats(words((MANTISSAS + 0x3F800000).astype(np.int32)))
"""float32 from 1 to 2; not the last one, whose reciprocal is next to a tie."""


@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_a_reciprocal_is_rounded(ulps: int) -> None:
    """From the approximation's error of at most one unit in the last place."""
    expected = (1 / NUMBERS.astype(np.float64)).astype(np.float32)
    near = floats(words(expected) + np.uint32(ulps % 2**32))
    for _ in range(2):
        near = fma(fma(-NUMBERS, near, np.float32([1])), near, near)
    assert np.array_equal(near, expected)


@pytest.mark.parametrize("divisor", [127.0, 255.0, 448.0])
def test_a_quotient_is_rounded(divisor: float) -> None:
    inverse, negative = np.float32([1 / divisor]), np.float32([-divisor])
    near = NUMBERS * inverse
    expected = NUMBERS / np.float32(divisor)
    assert not np.array_equal(near, expected)
    assert np.array_equal(fma(fma(near, negative, NUMBERS), inverse, near), expected)


def test_low_bytes_are_packed_in_order() -> None:
    (text,) = assembly_of(triton_math.low_bytes)
    numbers = RANDOM.integers(0, 2**32, (4, 1000), dtype=np.uint32)
    packed = execute(text, *numbers).view(np.uint8).reshape(-1, 4)
    assert np.array_equal(packed.T, numbers.astype(np.uint8))


def test_a_product_is_rounded_once() -> None:
    (text,) = assembly_of(triton_math.product)
    left, right = RANDOM.standard_normal((2, 1000), dtype=np.float32)
    assert np.array_equal(floats(execute(text, words(left), words(right))), left * right)


@pytest.mark.parametrize(("number", "dtype"), [(0, torch.bfloat16), (1, torch.float16)])
def test_a_sum_is_its_twins(number: int, dtype: torch.dtype) -> None:
    """Any two numbers, and pairs near ties, where rounding twice would show."""
    text = assembly_of(triton_math.add)[number]
    pairs = torch.from_numpy(RANDOM.integers(-(2**15), 2**15, (2, 2**17), dtype=np.int16))
    x, y = pairs.view(dtype)
    y[::2] = (x[::2].float() * 2.0 ** torch.randint(-12, -6, (2**16,))).to(dtype)
    finite = x.isfinite() & y.isfinite()
    x, y = x[finite], y[finite]
    x, y = x[: len(x) // 2 * 2], y[: len(y) // 2 * 2]
    made = torch.from_numpy(execute(text, _pairs(x), _pairs(y)).view(np.int16)).view(dtype)
    expected = (x.float() + y.float()).to(dtype)
    assert torch.equal(made.view(torch.int16), expected.view(torch.int16))


def _pairs(x: Tensor) -> NDArray[np.uint32]:
    """16-bit numbers, two in a register."""
    return x.contiguous().view(torch.int16).numpy().view(np.uint32)


def test_silu_is_near() -> None:
    """|x| roundings of log2(e) and of x * log2(e) each, and four of other steps."""
    (text,) = assembly_of(triton_math.silu)
    x = np.linspace(-86, 86, 10001, dtype=np.float32)
    expected = x / (1 + np.exp(-x.astype(np.float64)))
    made = floats(execute(text, words(x))).astype(np.float64)
    assert (np.abs(made - expected) <= 2.0**-24 * (2 * np.abs(x) + 4) * np.abs(expected)).all()


def test_silu_of_what_is_large_or_no_number() -> None:
    (text,) = assembly_of(triton_math.silu)
    x = np.float32([np.inf, -np.inf, np.nan, 3e38, -100, -3e38])
    made = floats(execute(text, words(x)))
    assert made[0] == np.inf
    assert np.isnan(made[1:3]).all()
    assert made[3:].tolist() == [x[3], 0, 0]
