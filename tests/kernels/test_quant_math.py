"""Rounding to codes and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit_kernels.quant_math import dequantize_codes, minmax_scales, quantize_codes

BITS = st.integers(2, 8)


@given(bits=BITS, symmetric=st.booleans(), seed=st.integers(0, 2**16), shift=st.floats(-3, 3))
def test_rounding_moves_a_weight_by_at_most_half_a_step(
    bits: int, symmetric: bool, seed: int, shift: float
) -> None:
    weight = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(seed)) + shift
    scales, zeros = minmax_scales(weight, bits, symmetric=symmetric)
    codes = quantize_codes(weight, scales, zeros, bits)
    error = (dequantize_codes(codes, scales, zeros) - weight).abs() / scales
    # The rounded zero-point shifts an asymmetric range by up to half a step: its ends may clamp.
    # A symmetric range ends half a step above the highest code.
    assert float(error.max()) <= (0.5 if symmetric else 1.0) + 1e-3


@given(bits=BITS, seed=st.integers(0, 2**16))
def test_codes_survive_a_round_trip(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (4, 2, 16), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 2**bits, (4, 2, 1), dtype=torch.uint8, generator=generator)
    scales = torch.rand(4, 2, 1, generator=generator) + 0.1
    assert torch.equal(
        quantize_codes(dequantize_codes(codes, scales, zeros), scales, zeros, bits), codes
    )


@given(bits=BITS, seed=st.integers(0, 2**16))
def test_zero_is_represented_exactly(bits: int, seed: int) -> None:
    weight = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(seed)) + 5
    weight[..., 0] = 0
    scales, zeros = minmax_scales(weight, bits, symmetric=False)
    codes = quantize_codes(weight, scales, zeros, bits)
    assert not dequantize_codes(codes, scales, zeros)[..., 0].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_gets_a_usable_scale(symmetric: bool) -> None:
    weight = torch.zeros(1, 1, 16)
    scales, zeros = minmax_scales(weight, 4, symmetric=symmetric)
    codes = quantize_codes(weight, scales, zeros, 4)
    assert (scales > 0).all()
    assert not dequantize_codes(codes, scales, zeros).any()


def test_halves_round_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5]])
    codes = quantize_codes(weight, torch.ones(1, 1), torch.full((1, 1), 8), 4)
    assert codes.tolist() == [[8, 10, 10, 8]]


def test_codes_are_clamped() -> None:
    weight = torch.tensor([[100.0, -100.0]])
    codes = quantize_codes(weight, torch.ones(1, 1), torch.full((1, 1), 8), 4)
    assert codes.tolist() == [[15, 0]]
