import pytest
import torch
from torch import Tensor, nn

from vllm_quantkit.quantize import awq, awq_scales, fold, rtn
from vllm_quantkit.quantize.awq import share_over_heads
from vllm_quantkit.quantize.calibration import InputStats
from vllm_quantkit.spec import WeightSpec

N, K = 48, 256
SPEC = WeightSpec(bits=4, group_size=64, symmetric=False)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stats_of(inputs: Tensor) -> InputStats:
    return InputStats(inputs.T @ inputs / len(inputs), inputs.abs().mean(0))


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(N, K, generator=generator(0)) * 0.05


@pytest.fixture(scope="module")
def outliers() -> Tensor:
    """Inputs with a few channels thirty times the size of the others."""
    inputs = torch.randn(512, K, generator=generator(1))
    inputs[:, [3, 70, 71, 200]] *= 30
    return inputs


def relative_error(inputs: Tensor, weight: Tensor, rounded: Tensor) -> float:
    return float((inputs @ (weight - rounded).T).norm() / (inputs @ weight.T).norm())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_lowers_the_output_error_where_channels_stand_out(
    bits: int, symmetric: bool, weight: Tensor, outliers: Tensor
):
    spec = WeightSpec(bits=bits, group_size=64, symmetric=symmetric)
    scales = awq_scales([weight], stats_of(outliers), spec)
    scaled = awq(weight * scales, stats_of(outliers / scales), spec).dequantize() / scales
    nearest = rtn(weight, spec).dequantize()
    assert relative_error(outliers, weight, scaled) < 0.6 * relative_error(
        outliers, weight, nearest
    )
    assert scales[[3, 70, 71, 200]].min() > scales.median()


def test_is_never_worse_than_rounding_to_nearest(weight: Tensor):
    for seed in range(5):
        inputs = torch.randn(64, K, generator=generator(seed))
        scales = awq_scales([weight], stats_of(inputs), SPEC)
        rounded = rtn(weight * scales, SPEC).dequantize() / scales
        nearest = rtn(weight, SPEC).dequantize()
        bound = relative_error(inputs, weight, nearest) * (1 + 1e-4)
        assert relative_error(inputs, weight, rounded) <= bound


def test_channels_that_never_fire_get_finite_scales(weight: Tensor, outliers: Tensor):
    inputs = outliers.clone()
    inputs[:, :10] = 0
    dead_weight = weight.clone()
    dead_weight[:, 5:15] = 0
    scales = awq_scales([dead_weight], stats_of(inputs), SPEC)
    assert scales.isfinite().all()
    assert scales.min() > 0


def test_heads_that_read_one_channel_share_its_scale(weight: Tensor, outliers: Tensor):
    scales = awq_scales([weight], stats_of(outliers), SPEC, repeats=2, width=32)
    heads = scales.view(-1, 2, 32)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert not torch.equal(heads[0], heads[1])


def test_sharing_takes_the_geometric_mean():
    shared = share_over_heads(torch.tensor([1.0, 2.0, 4.0, 8.0]), repeats=2, width=2)
    torch.testing.assert_close(shared, torch.tensor([2.0, 4.0, 2.0, 4.0]))


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size, generator=generator(5)) + 0.5)
        self.weight.data = self.weight.data.bfloat16().float()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize("powers", [True, False], ids=["powers-of-two", "any"])
@pytest.mark.parametrize("kind", ["norm", "linear"])
def test_folding_changes_no_output(kind: str, powers: bool):
    torch.manual_seed(0)
    previous = Norm(32) if kind == "norm" else nn.Linear(16, 32)
    consumers = [nn.Linear(32, 8), nn.Linear(32, 4)]
    x = torch.randn(10, 32 if kind == "norm" else 16)
    before = [consumer(previous(x)) for consumer in consumers]
    scales = torch.rand(32) * 3 + 0.2
    if powers:
        scales = scales.log2().round().exp2()
    weights = [consumer.weight for consumer in consumers]
    fold(previous, weights, scales, dtype=torch.bfloat16 if kind == "norm" else torch.float32)
    after = [consumer(previous(x)) for consumer in consumers]
    tolerance = 0 if powers else 1e-5
    for expected, actual in zip(before, after, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_folded_norm_is_what_the_checkpoint_stores():
    norm, consumer = Norm(32), nn.Linear(32, 8)
    fold(
        norm, [consumer.weight], torch.rand(32, generator=generator(6)) + 0.3, dtype=torch.bfloat16
    )
    assert torch.equal(norm.weight.data.bfloat16().float(), norm.weight.data)


def test_runs_repeat(weight: Tensor, outliers: Tensor):
    first, second = (awq_scales([weight], stats_of(outliers), SPEC) for _ in range(2))
    assert torch.equal(first, second)
