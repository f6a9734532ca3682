import pytest
import torch
from torch import Tensor

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize import gptq, rtn
from vllm_quantkit.quantize.gptq import inverse_factor
from vllm_quantkit.spec import WeightSpec

N, K = 24, 192

SPECS = [
    WeightSpec(bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order)
    for bits in (2, 3, 4, 8)
    for group_size in (64, 80, -1)
    for symmetric in (True, False)
    for act_order in (False, True)
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated_hessian(size: int = K, seed: int = 0) -> Tensor:
    mix = torch.randn(size, size, generator=generator(seed)) / size**0.5
    scale = torch.rand(size, generator=generator(seed + 1)) * 2 + 0.1
    inputs = torch.randn(1024, size, generator=generator(seed + 2)) @ (torch.eye(size) + 2 * mix)
    inputs = inputs * scale
    return inputs.T @ inputs / len(inputs)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(N, K, generator=generator(9))


@pytest.fixture(scope="module")
def hessian() -> Tensor:
    return correlated_hessian()


def output_error(result: QuantizedWeight, weight: Tensor, hessian: Tensor) -> float:
    error = result.dequantize() - weight
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_lowers_the_output_error_of_rounding_to_nearest(
    spec: WeightSpec, weight: Tensor, hessian: Tensor
):
    clip = spec.bits == 2  # a grid of four levels over the full range saturates on the feedback
    result = gptq(weight, hessian, spec, clip=clip)
    nearest = rtn(weight, spec, clip=clip)
    assert int(result.codes.max()) < 2**spec.bits
    assert result.scales.shape == nearest.scales.shape
    ratio = output_error(result, weight, hessian) / output_error(nearest, weight, hessian)
    assert ratio < 0.8


def naive_gptq(weight: Tensor, hessian: Tensor, grid: QuantizedWeight) -> Tensor:
    """Optimal brain quantisation in a fixed order on a fixed grid, straight from its definition."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    scales = grid.scales[:, grid.group_index.long()].double()
    zeros = grid.zeros[:, grid.group_index.long()].double()
    codes = torch.zeros_like(weight)
    for k in range(weight.shape[1]):
        raw = torch.round(weight[:, k] / scales[:, k]) + zeros[:, k]
        codes[:, k] = raw.clamp(0, 2**grid.bits - 1)
        rounded = (codes[:, k] - zeros[:, k]) * scales[:, k]
        error = (weight[:, k] - rounded) / inverse[k, k]
        weight -= error[:, None] * inverse[k]
        inverse -= inverse[:, k : k + 1] * inverse[k] / inverse[k, k]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_definition(symmetric: bool, weight: Tensor, hessian: Tensor):
    spec = WeightSpec(bits=4, group_size=-1, symmetric=symmetric)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(K)
    result = gptq(weight, hessian, spec)
    expected = naive_gptq(weight, damped, rtn(weight, spec))
    same = (result.codes == expected).float().mean()
    assert float(same) > 0.999, "only float32 near ties may differ"


def test_uncorrelated_channels_are_rounded_to_nearest(weight: Tensor):
    hessian = torch.diag(torch.rand(K, generator=generator(3)) + 0.5)
    spec = WeightSpec(bits=4, group_size=64, symmetric=False)
    result, nearest = gptq(weight, hessian, spec), rtn(weight, spec)
    assert torch.equal(result.codes, nearest.codes)
    assert torch.equal(result.scales, nearest.scales)
    assert torch.equal(result.group_index, nearest.group_index)


def test_act_order_groups_channels_by_activity(weight: Tensor, hessian: Tensor):
    spec = WeightSpec(bits=4, group_size=64, symmetric=True, act_order=True)
    result = gptq(weight, hessian, spec)
    activity = hessian.diagonal()
    assert torch.bincount(result.group_index).tolist() == [64, 64, 64]
    first, second, third = (activity[result.group_index == group] for group in range(3))
    assert first.min() >= second.max()
    assert second.min() >= third.max()


def test_dead_channels_disturb_no_other(weight: Tensor, hessian: Tensor):
    alive = torch.ones(K, dtype=torch.bool)
    alive[[0, 5, 100, K - 1]] = False
    dead = hessian * alive * alive[:, None]
    spec = WeightSpec(bits=4, group_size=-1, symmetric=True)
    result = gptq(weight, dead, spec)
    assert torch.equal(result.codes[:, ~alive], rtn(weight, spec).codes[:, ~alive])
    assert output_error(result, weight, dead) < 0.8 * output_error(rtn(weight, spec), weight, dead)


def test_without_any_activity_it_rounds_to_nearest(weight: Tensor):
    spec = WeightSpec(bits=3, group_size=64, symmetric=False)
    result = gptq(weight, torch.zeros(K, K), spec)
    assert torch.equal(result.codes, rtn(weight, spec).codes)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_an_indefinite_hessian_is_damped_until_it_works(damping: float, weight: Tensor):
    basis = torch.randn(K, 8, generator=generator(4))
    hessian = basis @ basis.T - 0.5 * torch.eye(K)
    assert float(torch.linalg.eigvalsh(hessian)[0]) < -0.4
    result = gptq(
        weight, hessian, WeightSpec(bits=4, group_size=64, symmetric=True), damping=damping
    )
    assert result.dequantize().isfinite().all()


def test_factor_is_the_upper_cholesky_factor_of_the_inverse(hessian: Tensor):
    factor = inverse_factor(hessian, 0.01)
    hessian = hessian.double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor, expected, rtol=1e-8, atol=1e-10)


def test_a_hopeless_hessian_is_refused(weight: Tensor):
    spec = WeightSpec(bits=4, group_size=64, symmetric=True)
    with pytest.raises(QuantkitError, match="not positive definite even with damping"):
        gptq(weight, -torch.eye(K), spec)


def test_what_is_not_finite_is_refused(weight: Tensor, hessian: Tensor):
    spec = WeightSpec(bits=4, group_size=64, symmetric=True)
    with pytest.raises(QuantkitError, match="Hessian has NaN"):
        gptq(weight, hessian.clone().fill_diagonal_(float("nan")), spec)
    with pytest.raises(QuantkitError, match="weight has"):
        gptq(weight.clone().fill_(float("nan")), hessian, spec)


def test_inputs_stay_and_runs_repeat(weight: Tensor, hessian: Tensor):
    spec = WeightSpec(bits=4, group_size=64, symmetric=False, act_order=True)
    before = weight.clone(), hessian.clone()
    first, second = gptq(weight, hessian, spec), gptq(weight, hessian, spec)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    for name in ("codes", "scales", "zeros", "group_index"):
        assert torch.equal(getattr(first, name), getattr(second, name))
