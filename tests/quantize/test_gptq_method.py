"""GPTQ against the paper's algorithm, column by column in float64 with an explicit inverse."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.methods.gptq import find_feedback, gptq
from vllm_quantkit.quantize.methods.rtn import rtn
from vllm_quantkit.spec import WeightSpec

N, K = 24, 200
ORDERS = ("none", "static", "group")


def spec_of(bits: int, group_size: int, symmetric: bool, order: str = "none") -> WeightSpec:
    act_order = order == "group"
    return WeightSpec(bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order)


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


def reference_grid(group: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Scale, as float16 stores it, and zero-point of the full range of rows [N, g]."""
    levels = 2**spec.bits - 1
    if spec.symmetric:
        scale = 2 * group.abs().amax(1) / levels
        zero = torch.full_like(scale, 2 ** (spec.bits - 1))
    else:
        low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
        scale = (high - low) / levels
        zero = torch.round(-low / scale)
    return scale.half().double(), zero


def reference_gptq(weight: Tensor, damped: Tensor, spec: WeightSpec, order: str) -> Tensor:
    """Dequantised weights, by optimal brain quantisation in a fixed order: w -= e H^-1[k] / H^-1[k,
    k], after which channel k is taken out of the inverse."""
    width = K if spec.group_size == -1 else spec.group_size
    weight, inverse = weight.double().clone(), torch.linalg.inv(damped.double())
    natural = list(range(K))
    channels = sorted(natural, key=lambda k: -float(damped[k, k])) if order != "none" else natural
    rounded, original = torch.zeros_like(weight), weight.clone()
    for position, k in enumerate(channels):
        if order == "static":
            first = k // width * width
            scale, zero = reference_grid(original[:, first : first + width], spec)
        elif position % width == 0:
            scale, zero = reference_grid(weight[:, channels[position : position + width]], spec)
        code = (torch.round(weight[:, k] / scale) + zero).clamp(0, 2**spec.bits - 1)
        rounded[:, k] = (code - zero) * scale
        error = (weight[:, k] - rounded[:, k]) / inverse[k, k]
        weight = weight - error[:, None] * inverse[k]
        inverse = inverse - inverse[:, k : k + 1] * inverse[k] / inverse[k, k]
    return rounded


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [16, 64, 80, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_paper(
    symmetric: bool, group_size: int, order: str, weight: Tensor, hessian: Tensor
):
    spec = spec_of(4, group_size, symmetric, order)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(K)
    result, damping = gptq(weight, hessian, spec, order=order)
    expected = reference_gptq(weight, damped, spec, order)
    # A near tie that float32 rounds the other way changes the rest of its row: of 24 rows, two may.
    same = torch.isclose(result.dequantize().double(), expected, rtol=1e-3, atol=1e-5).all(1)
    assert int(same.sum()) >= N - 2
    assert damping == 0.01
    natural = torch.arange(K) // (K if group_size == -1 else group_size)
    assert torch.equal(result.group_index.long(), natural) == (order != "group" or group_size == -1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [64, 80, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lowers_the_output_error_of_rounding_to_nearest(
    bits: int, group_size: int, order: str, weight: Tensor, hessian: Tensor
):
    """By a fifth or more, on inputs as correlated as these; full ranges of four levels saturate on
    the feedback, so that 2 bits need clipping."""
    spec, clip = spec_of(bits, group_size, True, order), bits == 2
    result, _ = gptq(weight, hessian, spec, order=order, clip=clip)
    nearest = rtn(weight, spec, clip=clip)
    assert int(result.codes.max()) < 2**bits
    assert result.scales.shape == nearest.scales.shape
    assert torch.equal(result.scales.half().float(), result.scales)
    assert output_error(result, weight, hessian) < 0.8 * output_error(nearest, weight, hessian)


@pytest.mark.parametrize("order", ORDERS)
def test_clipping_lowers_it_further(order: str, weight: Tensor, hessian: Tensor):
    spec = spec_of(3, 64, True, order)
    clipped, full = (gptq(weight, hessian, spec, order=order, clip=c)[0] for c in (True, False))
    assert output_error(clipped, weight, hessian) < output_error(full, weight, hessian)


def test_uncorrelated_channels_are_rounded_to_nearest(weight: Tensor):
    hessian = torch.diag(torch.rand(K, generator=generator(3)) + 0.5)
    spec = spec_of(4, 64, False)
    nearest = rtn(weight, spec)
    for order in ("none", "static"):
        result, _ = gptq(weight, hessian, spec, order=order)
        for name in ("codes", "scales", "zeros", "group_index"):
            assert torch.equal(getattr(result, name), getattr(nearest, name)), name


def test_act_order_groups_channels_by_activity(weight: Tensor, hessian: Tensor):
    result, _ = gptq(weight, hessian, spec_of(4, 64, True, "group"), order="group")
    activity = hessian.diagonal()
    assert torch.bincount(result.group_index).tolist() == [64, 64, 64, 8]
    groups = [activity[result.group_index == group] for group in range(4)]
    assert all(a.min() >= b.max() for a, b in pairwise(groups))


@pytest.mark.parametrize("order", ["none", "static"])
def test_dead_channels_disturb_no_other(order: str, weight: Tensor, hessian: Tensor):
    alive = torch.ones(K, dtype=torch.bool)
    alive[[0, 5, 100, K - 1]] = False
    dead = hessian * alive * alive[:, None]
    spec = spec_of(4, -1, True)
    result, _ = gptq(weight, dead, spec, order=order)
    assert torch.equal(result.codes[:, ~alive], rtn(weight, spec).codes[:, ~alive])
    assert output_error(result, weight, dead) < 0.8 * output_error(rtn(weight, spec), weight, dead)


def test_without_any_activity_it_rounds_to_nearest(weight: Tensor):
    result, _ = gptq(weight, torch.zeros(K, K), spec_of(3, 64, False))
    assert torch.equal(result.codes, rtn(weight, spec_of(3, 64, False)).codes)


@pytest.mark.parametrize("damping", [1e-6, 0.01])
def test_an_indefinite_hessian_is_damped_until_it_works(damping: float, weight: Tensor):
    basis = torch.randn(K, 8, generator=generator(4))
    hessian = basis @ basis.T
    hessian.diagonal().clamp_(min=0.6).sub_(0.5)
    assert float(torch.linalg.eigvalsh(hessian)[0]) < -0.4
    result, used = gptq(weight, hessian, spec_of(4, 64, True), damping=damping)
    assert 0.01 < used < 1
    assert result.dequantize().isfinite().all()


def test_feedback_takes_the_damped_hessian_to_a_diagonal(hessian: Tensor):
    """M^-1 (H + d I) M^-T = D, M unit upper triangular."""
    found = find_feedback(hessian, 0.01)
    matrix, mean = found.matrix.double(), hessian.diagonal().mean()
    assert torch.equal(matrix, matrix.triu())
    assert torch.equal(matrix.diagonal(), torch.ones(K, dtype=torch.float64))
    inverse = torch.linalg.inv(matrix)
    pivots = inverse @ (hessian / mean + 0.01 * torch.eye(K)).double() @ inverse.T
    rest = pivots - torch.diag(pivots.diagonal())
    # Condition number 1e4 times float32's 6e-8.
    assert float(rest.abs().max() / pivots.diagonal().max()) < 1e-3
    assert float(pivots.diagonal().min()) > 0


def test_what_float32_cannot_factorise_is_factorised_in_float64():
    """Channels that differ by one part in 10^4 leave pivots of 1e-8: float32 sees only noise."""
    common = torch.randn(2048, 1, generator=generator(5), dtype=torch.float64)
    own = torch.randn(2048, 8, generator=generator(6), dtype=torch.float64)
    inputs = common + 1e-4 * own
    hessian = inputs.T @ inputs / len(inputs)
    found = find_feedback(hessian, 1e-9)
    mean = hessian.diagonal().mean()
    damped = hessian / mean + 1e-9 * torch.eye(8, dtype=torch.float64)
    factor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    assert found.damping == 1e-9
    torch.testing.assert_close(
        found.matrix.double(), factor / factor.diagonal(), rtol=1e-5, atol=1e-6
    )


def test_a_hopeless_hessian_is_refused(weight: Tensor):
    indefinite = 1e9 * (1 - torch.eye(K)) + torch.eye(K)
    with pytest.raises(QuantkitError, match="not positive definite even with damping"):
        gptq(weight, indefinite, spec_of(4, 64, True))
    with pytest.raises(QuantkitError, match="has 200 negative values on its diagonal of 200"):
        gptq(weight, -torch.eye(K), spec_of(4, 64, True))


def test_what_is_not_finite_is_refused(weight: Tensor, hessian: Tensor):
    spec = spec_of(4, 64, True)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(QuantkitError, match="Hessian has NaN"):
            gptq(weight, hessian.clone().fill_diagonal_(bad), spec)
        with pytest.raises(QuantkitError, match="weight has"):
            gptq(weight.clone().fill_(bad), hessian, spec)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_do_not_depend_on_each_other(order: str, weight: Tensor, hessian: Tensor):
    spec = spec_of(4, 64, False, order)
    whole, _ = gptq(weight, hessian, spec, order=order)
    parts = [gptq(part, hessian, spec, order=order)[0] for part in weight.split([10, 14])]
    rows = torch.cat([part.codes for part in parts])
    # Sums of other lengths round differently, and near ties with them.
    assert float((rows == whole.codes).float().mean()) > 0.99


def test_inputs_stay_and_runs_repeat(weight: Tensor, hessian: Tensor):
    before = weight.clone(), hessian.clone()
    for order in ORDERS:
        spec = spec_of(4, 64, False, order)
        first, second = (gptq(weight, hessian, spec, order=order)[0] for _ in range(2))
        for name in ("codes", "scales", "zeros", "group_index"):
            assert torch.equal(getattr(first, name), getattr(second, name))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
