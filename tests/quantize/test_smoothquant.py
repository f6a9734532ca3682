"""SmoothQuant's factors, and what is done with them, without a model."""

import pytest
import torch

from vllm_quantkit.quantize.methods.smoothquant import Sharing, smooth_weight, smoothing_factors


def test_factors_are_the_papers_rounded_to_powers_of_two():
    inputs = torch.tensor([64.0, 1.0, 100.0, 0.25])
    weights = torch.tensor([0.25, 0.25, 1.0, 4.0])

    # 64**.5 / .25**.5 = 16; 1 / .5 = 2; 10 -> 8; .5 / 2 = .25
    assert smoothing_factors(inputs, weights, 0.5).tolist() == [16, 2, 8, 0.25]
    # 1 / max|W|, and max|X|
    assert smoothing_factors(inputs, weights, 0.0).tolist() == [4, 4, 1, 0.25]
    assert smoothing_factors(inputs, weights, 1.0).tolist() == [64, 1, 128, 0.25]


def test_channels_that_never_fire_stay_and_those_never_read_are_finite():
    factors = smoothing_factors(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 0.0]), 0.5)

    assert factors[0] == 1
    assert 0 < factors[1] < torch.inf


def test_heads_that_share_a_head():
    """Two key-value heads of two channels, read by three query heads each."""
    sharing = Sharing(sharers=3, width=2)
    inputs = torch.tensor([1.0, 2, 3, 4, 5, 0, 9, 8, 7, 6, 5, 4])

    assert sharing.largest(inputs).tolist() == [5, 4, 9, 8]
    assert sharing.spread(torch.tensor([1.0, 2, 3, 4])).tolist() == 3 * [1, 2] + 3 * [3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_smoothing_a_weight_is_exact(dtype):
    """Even of float16's subnormal numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = (1e-4 * torch.randn(6, 5, generator=generator)).to(dtype)
    inputs = torch.tensor([0.5, 1, 2, 64, 4])
    outputs = torch.tensor([32.0, 0.25])

    smoothed = smooth_weight(weight, inputs, outputs)

    divisors = torch.tensor([1, 1, 1, 1, 32, 0.25])[:, None]
    assert torch.equal(smoothed.double(), weight.double() * inputs / divisors)
    assert torch.equal(smooth_weight(weight, None, None).to(dtype), weight)
