"""Canonical tensors in, products out: what a scheme packs computes what its spec means."""

from __future__ import annotations

import pytest
import torch

from quantkit_kernels.act_quant import RowQuantizer, quantize_rows, reference_quantize
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats import Role
from vllm_quantkit.options import LayerOptions
from vllm_quantkit.quantize.methods.data_free import quantize_data_free, relative_error
from vllm_quantkit.schemes import get_method, w8a8
from vllm_quantkit.schemes.linear import linear_scheme
from vllm_quantkit.spec import ALL_ROWS, PER_CHANNEL, ActivationSpec, SchemeSpec, WeightSpec

N, K = 96, 256
ROUNDED_SUMS = 3e-6
"""Relative error of sums in float32, in another order."""


def parts_of(weight: QuantizedWeight) -> dict[Role, torch.Tensor]:
    return {
        Role.CODES: weight.codes,
        Role.SCALES: weight.scales,
        Role.ZEROS: weight.zeros,
        Role.GROUP_INDEX: weight.group_index,
    }


def weight_and_input() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, K, generator=generator), torch.randn(3, K, generator=generator)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_gpu_without_fp8_multiplies_fp8_weights_by_16_bits(monkeypatch):
    monkeypatch.setattr(w8a8, "lacks_fp8", lambda device: True)
    scheme = linear_scheme(get_method("quantkit-fp8").at_load(LayerOptions()))
    weight, x = weight_and_input()
    quantized = scheme.quantize(weight)

    packed = scheme.pack(parts_of(quantized), torch.float32)

    assert "weight-only because this GPU has no FP8 arithmetic" in packed.kernel.name
    assert packed.kernel.quantizer is None
    y = packed.kernel.apply(x, packed.tensors, None)
    assert error(y, x @ quantized.dequantize().T) <= ROUNDED_SUMS


@pytest.mark.parametrize(
    ("capability", "lacks"), [((8, 0), True), ((8, 9), False), ((9, 0), False)]
)
def test_which_gpus_lack_fp8(capability, lacks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert w8a8.lacks_fp8(torch.device("cuda")) is lacks
    assert not w8a8.lacks_fp8(torch.device("cpu"))


def test_rows_quantised_before_are_taken_as_they_are():
    scheme = linear_scheme(get_method("quantkit-smoothquant").at_load(LayerOptions()))
    weight, x = weight_and_input()
    packed = scheme.pack(parts_of(scheme.quantize(weight)), torch.float32)
    rows = quantize_rows(x, RowQuantizer("int8"))

    apply = packed.kernel.apply
    assert torch.equal(apply(rows, packed.tensors, None), apply(x, packed.tensors, None))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric rows", "asymmetric rows"])
def test_integers_with_zero_points_on_both_sides(symmetric):
    spec = SchemeSpec(
        dialect="compressed-tensors",
        variant="int-quantized",
        weight=WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=False),
        activation=ActivationSpec(code="int8", symmetric=symmetric),
    )
    weight, x = weight_and_input()
    quantized = quantize_data_free(weight + 1, spec.weight, "none")
    assert (quantized.zeros != 128).all()

    packed = linear_scheme(spec).pack(parts_of(quantized), torch.float32)

    quantizer = RowQuantizer("int8", symmetric=symmetric, sum_group=K)
    assert packed.kernel.quantizer == quantizer
    y = packed.kernel.apply(x, packed.tensors, None)
    rows = reference_quantize(x, quantizer).dequantize()
    assert error(y, rows @ quantized.dequantize().T) <= ROUNDED_SUMS


def test_llm_int8_with_statistics_fixes_its_outliers():
    scheme = linear_scheme(get_method("quantkit-llm-int8").at_load(LayerOptions()))
    weight, x = weight_and_input()
    x[:, [3, 77]] *= 40
    quantized = scheme.quantize(weight)
    absmax = {Role.INPUT_ABSMAX: x.abs().amax(0)}

    fixed = scheme.pack({**parts_of(quantized), **absmax}, torch.float32)
    found = scheme.pack(parts_of(quantized), torch.float32)

    assert "fixed by statistics" in fixed.kernel.name
    assert "found in every batch" in found.kernel.name
    assert fixed.tensors["outlier_channels"].tolist() == [3, 77]
    y = found.kernel.apply(x, found.tensors, None)
    assert error(fixed.kernel.apply(x, fixed.tensors, None), y) <= ROUNDED_SUMS
    plain = reference_quantize(x, RowQuantizer("int8")).dequantize() @ quantized.dequantize().T
    exact = x @ quantized.dequantize().T
    assert error(y, exact) < 0.2 * error(plain, exact)


def test_a_rank_that_cuts_a_block_is_refused():
    scheme = linear_scheme(get_method("quantkit-fp8-block").at_load(LayerOptions()))
    weight, _ = weight_and_input()
    quantized = scheme.quantize(weight)
    parts = parts_of(quantized)
    parts[Role.CODES] = parts[Role.CODES][:, 64:192].contiguous()
    parts[Role.GROUP_INDEX] = parts[Role.GROUP_INDEX][64:192]

    with pytest.raises(UnsupportedScheme, match="tensor-parallel"):
        scheme.pack(parts, torch.float32)


def test_a_rank_takes_its_own_blocks():
    scheme = linear_scheme(get_method("quantkit-fp8-block").at_load(LayerOptions()))
    weight, x = weight_and_input()
    quantized = scheme.quantize(weight)
    parts = parts_of(quantized)
    parts[Role.CODES] = parts[Role.CODES][:, 128:].contiguous()
    parts[Role.GROUP_INDEX] = parts[Role.GROUP_INDEX][128:]

    packed = scheme.pack(parts, torch.float32)

    y = packed.kernel.apply(x[:, 128:], packed.tensors, None)
    rows = reference_quantize(x[:, 128:], RowQuantizer("e4m3", 128)).dequantize()
    assert error(y, rows @ quantized.dequantize()[:, 128:].T) <= ROUNDED_SUMS


FLOATS = {"channel": (1, PER_CHANNEL), "tensor": (ALL_ROWS, PER_CHANNEL), "block": (128, 128)}


@pytest.mark.parametrize("size", [(96, 256), (130, 200), (1, 7)])
@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("code_type", ["e4m3", "e5m2"])
def test_float8_weights(code_type, kind, size):
    """Half a unit in the last of 3 or 2 mantissa bits, on average over a binade about 0.4 of it."""
    rows, group = FLOATS[kind]
    spec = WeightSpec(
        bits=8, group_size=group, symmetric=True, code_type=code_type, scale_rows=rows
    )
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1))

    quantized = quantize_data_free(weight, spec, "none")

    distinct = {"channel": size[0], "tensor": 1, "block": -(-size[0] // 128) * -(-size[1] // 128)}
    assert len(quantized.scales.unique()) == distinct[kind]
    assert relative_error(weight, quantized) < {"e4m3": 2**-4, "e5m2": 2**-3}[code_type]
    largest = quantized.dequantize().abs().max()
    assert torch.isclose(largest, weight.abs().max(), rtol=1e-6)


def test_int4_at_load_is_better_than_rounding_to_nearest():
    """Clipping lowers the squared error, and HQQ the error of most weights, with outliers there."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 512, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.005] *= 5
    spec = WeightSpec(bits=4, group_size=128, symmetric=False)
    made = {refine: quantize_data_free(weight, spec, refine) for refine in ("none", "clip", "hqq")}
    squared = {refine: relative_error(weight, quantized) for refine, quantized in made.items()}
    absolute = {r: (weight - q.dequantize()).abs().mean().item() for r, q in made.items()}

    assert squared["clip"] < 0.97 * squared["none"]
    assert absolute["hqq"] < absolute["clip"] < absolute["none"]
