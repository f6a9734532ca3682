"""SmoothQuant's exponent, against brute force over all with quantisation written out in float64."""

import pytest
import torch
from torch import Tensor

from tests.quantize.stage_data import correlated_inputs, random_weight, stats_of
from vllm_quantkit.quantize.methods.smoothing_search import (
    ALPHAS,
    scaled_ranges,
    search_smoothing_scales,
    served_inputs,
    smoothing_scales,
)
from vllm_quantkit.quantize.methods.smoothquant import Sharing
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe
from vllm_quantkit.spec import ActivationSpec, WeightSpec

K = 80
NO_SHARING = Sharing(1, 1)
INT8 = WeightSpec(bits=8, group_size=-1, symmetric=True)
E4M3 = WeightSpec(bits=8, group_size=-1, symmetric=True, code_type="e4m3")
TOKEN, STATIC = (
    ActivationSpec(code="int8"),
    ActivationSpec(code="int8", dynamic=False, group_size=0),
)


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    inputs = correlated_inputs(K, tokens=200)
    inputs[:, [5, 40]] *= 40
    return inputs


@pytest.fixture(scope="module")
def weights() -> list[Tensor]:
    return [random_weight(9, K, seed=1), random_weight(14, K, seed=2)]


def reference_factors(inputs: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    columns = torch.cat(weights).abs().amax(0).double()
    factors = inputs.abs().amax(0).double() ** alpha / columns ** (1 - alpha)
    return 2.0 ** factors.log2().round()


def reference_error(
    inputs: Tensor, weights: list[Tensor], scales: Tensor, *, per_token: bool
) -> float:
    """sum_W |X W^T - Q8(X / s) Q8(W s)^T|^2; per row of W, per token or over all of X."""
    x, total = inputs.double() / scales, 0.0
    largest = x.abs().amax(1, keepdim=True) if per_token else x.abs().amax()
    read = torch.round(x / (largest / 127)) * (largest / 127)
    for weight in weights:
        scaled = weight.double() * scales
        step = scaled.abs().amax(1, keepdim=True) * 2 / 255
        rounded = torch.round(scaled / step).clamp(-128, 127) * step
        total += float((inputs.double() @ weight.double().T - read @ rounded.T).square().sum())
    return total


@pytest.mark.parametrize("per_token", [True, False], ids=["token", "static"])
def test_finds_the_exponent_of_least_error(per_token: bool, inputs: Tensor, weights: list[Tensor]):
    recipe = LayerRecipe(
        weight=INT8, activation=TOKEN if per_token else STATIC, transform="smoothquant"
    )
    scales, alpha = search_smoothing_scales(stats_of(inputs), weights, recipe, NO_SHARING)
    errors = {
        alpha: reference_error(
            inputs, weights, reference_factors(inputs, weights, alpha), per_token=per_token
        )
        for alpha in ALPHAS
    }
    # A row's largest weight lies half-way between codes: float32 and float64 take different ones.
    assert errors[alpha] <= min(errors.values()) * 1.01
    unscaled = reference_error(inputs, weights, torch.ones(K), per_token=per_token)
    assert errors[alpha] < 0.3 * unscaled
    assert torch.equal(scales.double(), reference_factors(inputs, weights, alpha))


def test_factors_are_shared_by_the_largest(inputs: Tensor, weights: list[Tensor]):
    sharing = Sharing(2, 20)
    scales = smoothing_scales(inputs.abs().amax(0), weights, sharing, 0.5)
    heads = inputs.view(-1, 2, 2, 20).abs().amax((0, 2)).flatten()
    columns = torch.cat(weights).view(-1, 2, 2, 20).abs().amax((0, 2)).flatten()
    expected = (heads / columns).sqrt().log2().round().exp2().view(2, 1, 20).expand(2, 2, 20)
    assert torch.equal(scales.view(2, 2, 20), expected)


def test_where_scaling_cannot_help_nothing_is_scaled():
    """Weights and inputs that 8 bits hold exactly."""
    inputs = torch.eye(K) * 127
    inputs[0, :] = 127
    weight = torch.eye(K) * 127.5
    recipe = LayerRecipe(weight=INT8, activation=TOKEN, transform="smoothquant")
    scales, alpha = search_smoothing_scales(stats_of(inputs), [weight], recipe, NO_SHARING)
    assert alpha is None
    assert torch.equal(scales, torch.ones(K))


def test_inputs_as_they_are_served(inputs: Tensor):
    ranges = stats_of(inputs).ranges
    static = served_inputs(inputs, STATIC, ranges)
    step = float(inputs.abs().max()) / 127
    torch.testing.assert_close(static, torch.round(inputs / step) * step, rtol=1e-5, atol=1e-5)
    assert float((static - inputs).abs().max()) <= step * 0.501
    other = served_inputs(inputs[:3], STATIC, ranges)
    assert torch.equal(other, static[:3]), "static scales are of the whole calibration set"
    dynamic = served_inputs(inputs, TOKEN, ranges)
    steps = inputs.abs().amax(1, keepdim=True) / 127
    assert bool(((dynamic - inputs).abs() <= steps * 0.501).all())


def test_outliers_stay_as_they_are(inputs: Tensor):
    activation = ActivationSpec(code="int8", outlier_threshold=6.0)
    served = served_inputs(inputs, activation, stats_of(inputs).ranges)
    outliers = (inputs.abs() > 6).any(0)
    assert 0 < int(outliers.sum()) < K
    assert torch.equal(served[:, outliers], inputs[:, outliers])
    largest = inputs[:, ~outliers].abs().amax(1, keepdim=True)
    error = (served - inputs)[:, ~outliers].abs()
    assert bool((error <= largest / 127 * 0.501).all())
    assert float(error.max()) > 0


@pytest.mark.parametrize("weight", [INT8, E4M3], ids=["int8", "e4m3"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_any_numerics(weight: WeightSpec, rounding: str, inputs: Tensor, weights: list[Tensor]):
    if weight is E4M3 and rounding != "nearest":
        return
    recipe = LayerRecipe(weight=weight, transform="smoothquant", rounding=rounding)
    scales, alpha = search_smoothing_scales(stats_of(inputs), weights, recipe, NO_SHARING)
    assert (alpha is None) == torch.equal(scales, torch.ones(K))


def test_ranges_of_scaled_inputs(inputs: Tensor):
    scales = torch.linspace(0.5, 2, K)
    found = scaled_ranges(stats_of(inputs).ranges, scales)
    torch.testing.assert_close(found.absmax, (inputs / scales).abs().amax(0), rtol=1e-6, atol=0)
