"""AWQ's search, against output errors that brute force finds on the inputs themselves."""

import pytest
import torch
from torch import Tensor

from tests.quantize.stage_data import correlated_inputs, generator, relative_error, stats_of
from vllm_quantkit.quantize.methods.awq import (
    ALPHAS,
    awq_scales,
    relative_magnitude,
    search_awq_scales,
)
from vllm_quantkit.quantize.methods.rounding import nearest, output_error
from vllm_quantkit.quantize.methods.rtn import rtn
from vllm_quantkit.quantize.methods.smoothquant import Sharing
from vllm_quantkit.quantize.methods.transforms import channel_scales
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe
from vllm_quantkit.spec import WeightSpec

N, K = 48, 256
SPEC = WeightSpec(bits=4, group_size=64, symmetric=False)
NO_SHARING = Sharing(1, 1)
OUTLIERS = [3, 70, 71, 200]


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(N, K, generator=generator(0)) * 0.05


@pytest.fixture(scope="module")
def outliers() -> Tensor:
    """Inputs with a few channels thirty times the size of the others."""
    inputs = torch.randn(512, K, generator=generator(1))
    inputs[:, OUTLIERS] *= 30
    return inputs


def awq(weights: list[Tensor], inputs: Tensor, spec: WeightSpec = SPEC) -> Tensor:
    recipe = LayerRecipe(weight=spec, transform="awq")
    return channel_scales(weights, stats_of(inputs), recipe, NO_SHARING).scales


def reference_error(inputs: Tensor, weights: list[Tensor], scales: Tensor) -> float:
    """sum_W |X W^T - (X / s) Q(W s)^T|^2 in float64, Q from minimum and maximum of each group."""
    total = 0.0
    for weight in weights:
        scaled = (weight * scales).double()
        rounded = torch.zeros_like(scaled)
        for row in range(len(scaled)):
            for first in range(0, K, 64):
                group = scaled[row, first : first + 64]
                low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
                step = (high - low) / 15
                zero = round(-low / step)
                codes = (torch.round(group / step) + zero).clamp(0, 15)
                rounded[row, first : first + 64] = (codes - zero) * step
        error = inputs.double() @ (weight - rounded / scales).T
        total += float(error.square().sum())
    return total


def reference_scales(inputs: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    groups = torch.cat(weights).abs().view(-1, K // 64, 64)
    magnitude = (groups / groups.amax(2, keepdim=True)).mean(0).flatten()
    scales = inputs.abs().mean(0) ** alpha / magnitude ** (1 - alpha)
    return scales / (scales.max() * scales.min()).sqrt()


def test_the_search_comes_close_to_brute_force():
    """The diagonal of H stands for all of it: within 2 % of the best error, in three cases."""
    for seed in range(3):
        inputs = correlated_inputs(K, tokens=128, seed=seed)
        inputs[:, OUTLIERS] *= 10
        sizes = torch.rand(K, generator=generator(seed)) + 0.2
        weights = [torch.randn(n, K, generator=generator(n + seed)) * sizes for n in (12, 7)]
        errors = [
            reference_error(inputs, weights, reference_scales(inputs, weights, alpha))
            for alpha in ALPHAS
        ]
        found = reference_error(inputs, weights, awq(weights, inputs))
        assert found <= 1.02 * min(errors)
        assert found < 0.5 * reference_error(inputs, weights, torch.ones(K))


@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
def test_scales_are_the_papers(alpha: float, weight: Tensor, outliers: Tensor):
    magnitude = relative_magnitude([weight[:20], weight[20:]], SPEC)
    found = awq_scales(outliers.abs().mean(0), magnitude, NO_SHARING, alpha)
    expected = reference_scales(outliers, [weight], alpha)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_hessian_gives_the_output_error(weight: Tensor, outliers: Tensor):
    error = weight - nearest(weight, SPEC)
    expected = (outliers.double() @ error.double().T).square().sum() / len(outliers)
    found = output_error(error, stats_of(outliers).hessian)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_lowers_the_output_error_where_channels_stand_out(
    symmetric: bool, bits: int, clip: bool, weight: Tensor, outliers: Tensor
):
    spec = WeightSpec(bits=bits, group_size=64, symmetric=symmetric)
    stats = stats_of(outliers)
    scales, alpha = search_awq_scales(
        stats.ranges.mean_abs, stats.hessian, [weight], spec, NO_SHARING, clip=clip
    )
    hessian = stats.hessian / scales / scales[:, None]
    scaled = rtn(weight * scales, spec, clip=clip, hessian=hessian).dequantize() / scales
    alone = rtn(weight, spec, clip=clip, hessian=stats.hessian).dequantize()
    # Clipping by the Hessian spares those channels, too, and leaves scales little to gain.
    bound = (1 if clip else 0.75) * relative_error(outliers, weight, alone)
    assert relative_error(outliers, weight, scaled) < bound
    assert alpha in ALPHAS
    assert clip or scales[OUTLIERS].min() > scales.median()


def test_is_never_worse_than_rounding_to_nearest(weight: Tensor):
    for seed in range(5):
        inputs = torch.randn(64, K, generator=generator(seed))
        scales = awq([weight], inputs)
        rounded = nearest(weight * scales, SPEC) / scales
        bound = relative_error(inputs, weight, nearest(weight, SPEC)) * (1 + 1e-4)  # float32 sums
        assert relative_error(inputs, weight, rounded) <= bound


def test_channels_that_never_fire_get_finite_scales(weight: Tensor, outliers: Tensor):
    inputs, dead_weight = outliers.clone(), weight.clone()
    inputs[:, :10] = 0
    dead_weight[:, 5:15] = 0
    scales = awq([dead_weight], inputs)
    assert scales.isfinite().all()
    assert scales.min() > 0


def test_heads_that_read_one_channel_share_its_scale(weight: Tensor, outliers: Tensor):
    """The geometric mean of what each would have."""
    sharing, magnitude = Sharing(2, 32), relative_magnitude([weight], SPEC)
    activation = outliers.abs().mean(0)
    alone = awq_scales(activation, magnitude, NO_SHARING, 0.5).view(-1, 2, 32)
    shared = awq_scales(activation, magnitude, sharing, 0.5).view(-1, 2, 32)
    assert torch.equal(shared[:, 0], shared[:, 1])
    expected = (alone[:, 0] * alone[:, 1]).sqrt()
    expected = expected / (expected.max() * expected.min()).sqrt()
    torch.testing.assert_close(shared[:, 0], expected, rtol=1e-5, atol=0)


def test_runs_repeat_and_leave_their_inputs(weight: Tensor, outliers: Tensor):
    before = weight.clone()
    first, second = (awq([weight], outliers) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(weight, before)
