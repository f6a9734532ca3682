import pytest
import torch

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.methods.rtn import diagonal_blocks, rtn
from vllm_quantkit.spec import WeightSpec

SPECS = [
    WeightSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    for bits in (2, 3, 4, 8)
    for group_size in (32, 128, -1)
    for symmetric in (True, False)
]


def random_weight(rows: int = 24, columns: int = 160, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def scale_of_each_weight(weight: QuantizedWeight) -> torch.Tensor:
    return weight.scales[:, weight.group_index.long()]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_shapes_dtypes_and_error_bound(spec: WeightSpec):
    weight = random_weight()
    result = rtn(weight, spec)
    groups = spec.num_groups(160)
    assert result.codes.dtype == result.zeros.dtype == torch.uint8
    assert result.scales.dtype == torch.float32
    assert result.group_index.dtype == torch.int32
    assert result.codes.shape == weight.shape
    assert result.scales.shape == result.zeros.shape == (24, groups)
    assert int(result.codes.max()) < 2**spec.bits
    error = (result.dequantize() - weight).abs() / scale_of_each_weight(result)
    assert float(error.max()) <= 1.01, "at most half a step, and half a step more where clamped"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_survive_the_checkpoint_dtype(dtype: torch.dtype):
    spec = WeightSpec(bits=4, group_size=32, symmetric=False)
    scales = rtn(random_weight(), spec, clip=True, scale_dtype=dtype).scales
    assert torch.equal(scales.to(dtype).float(), scales)


def test_codes_are_the_nearest_for_the_stored_scale():
    spec = WeightSpec(bits=8, group_size=32, symmetric=False)
    weight = random_weight()
    result = rtn(weight, spec)
    scales, zeros = scale_of_each_weight(result), result.zeros[:, result.group_index.long()]
    levels = torch.arange(256.0)[:, None, None]
    best = ((levels - zeros.float()) * scales - weight).abs().amin(0)
    torch.testing.assert_close((result.dequantize() - weight).abs(), best, rtol=0, atol=1e-6)


def test_order_decides_which_channels_share_a_group():
    spec = WeightSpec(bits=4, group_size=32, symmetric=True)
    weight = random_weight(columns=96)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    result = rtn(weight, spec, order=order)
    plain = rtn(weight[:, order], spec)
    assert torch.equal(result.dequantize()[:, order], plain.dequantize())
    assert torch.equal(result.group_index[order], plain.group_index)


@pytest.mark.parametrize("with_hessian", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_lowers_the_error_it_measures(symmetric: bool, with_hessian: bool):
    spec = WeightSpec(bits=3, group_size=32, symmetric=symmetric)
    weight = random_weight()
    inputs = random_weight(512, 160, seed=2) * torch.linspace(0.1, 3, 160)
    hessian = inputs.T @ inputs / 512 if with_hessian else torch.eye(160)
    blocks = diagonal_blocks(hessian, 32)

    def group_errors(result: QuantizedWeight) -> torch.Tensor:
        error = (result.dequantize() - weight).view(24, 5, 32)
        return torch.einsum("ngi,gij,ngj->ng", error, blocks, error)

    plain = group_errors(rtn(weight, spec))
    clipped = group_errors(rtn(weight, spec, clip=True, hessian=hessian if with_hessian else None))
    assert bool((clipped <= plain * (1 + 1e-5)).all())
    assert float(clipped.sum()) < 0.9 * float(plain.sum())


@pytest.mark.parametrize("value", [0.0, 1e-9, -3.0])
def test_constant_weights_stay_finite(value: float):
    for symmetric in (True, False):
        spec = WeightSpec(bits=4, group_size=32, symmetric=symmetric)
        result = rtn(torch.full((4, 64), value), spec).dequantize()
        torch.testing.assert_close(result, torch.full((4, 64), value), rtol=0.1, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float):
    weight = random_weight()
    weight[3, 5] = bad
    with pytest.raises(QuantkitError, match="1 NaN or infinite values among 3840"):
        rtn(weight, WeightSpec(bits=4, group_size=32, symmetric=True))


def test_scales_beyond_float16_are_refused():
    spec = WeightSpec(bits=4, group_size=32, symmetric=True)
    with pytest.raises(QuantkitError, match=r"does not fit in torch\.float16"):
        rtn(random_weight() * 1e7, spec)
    assert rtn(random_weight() * 1e7, spec, scale_dtype=torch.bfloat16).scales.isfinite().all()
