"""The op `quantkit::wna16_linear` and what every backend has in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit_kernels.code_types import CodeType, code_values
from quantkit_kernels.wna16 import (
    QuantizedWeight,
    generic,
    make_uniform,
    pack_weight,
    reference_linear,
    wna16_linear,
)
from quantkit_kernels.wna16.weights import (
    GROUP_SIZES,
    PADDING_ALLOWANCE,
    PackedWeight,
    gather_inputs,
)
from tests.kernels.wna16_cases import BITS, MAX_ERROR, random_inputs, random_weight, relative_error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _only_devices_present(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def to_device(weight: QuantizedWeight, device: str) -> QuantizedWeight:
    tensors = (weight.codes, weight.scales, weight.zeros, weight.group_index)
    return QuantizedWeight(*(t.to(device) for t in tensors), weight.bits, weight.code_type)


def arguments(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None = None
) -> tuple[object, ...]:
    return (
        x,
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.gather,
        bias,
        weight.bits,
        weight.group_size,
        weight.in_features,
        weight.out_features,
        weight.code_type,
        weight.zero,
        residual,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_opcheck(device: str, dtype: torch.dtype, bits: int, act_order: bool) -> None:
    weight = random_weight(48, 96, bits=bits, group_size=32, act_order=act_order)
    packed = pack_weight(to_device(weight, device), dtype)
    bias = torch.randn(48, dtype=dtype, device=device)
    for shape in ((5, 96), (2, 3, 96), (0, 96)):
        x = torch.randn(shape).to(device, dtype)
        residual = None if len(shape) == 3 else torch.randn(shape[0], 48).to(device, dtype)
        torch.library.opcheck(
            torch.ops.quantkit.wna16_linear.default,
            arguments(x, packed, bias, residual),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_order", [False, True])
def test_op_matches_reference(device: str, dtype: torch.dtype, act_order: bool) -> None:
    weight = random_weight(96, 320, group_size=64, act_order=act_order)
    packed = pack_weight(to_device(weight, device), dtype)
    x, bias = random_inputs(2, 7, 320, dtype=dtype), torch.randn(96)
    y = wna16_linear(x.to(device), packed, bias.to(device, dtype))
    assert y.dtype == dtype
    assert relative_error(y.cpu(), x, weight, bias.to(dtype)) <= MAX_ERROR[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, 1100])
def test_op_adds_a_residual(device: str, dtype: torch.dtype, m: int) -> None:
    """1100 tokens may be multiplied on another road than 3."""
    weight = random_weight(96, 128, group_size=64)
    packed = pack_weight(to_device(weight, device), dtype)
    x, bias = random_inputs(m, 128, dtype=dtype), torch.randn(96).to(dtype)
    residual = torch.randn(m, 96).to(dtype)
    y = wna16_linear(x.to(device), packed, bias.to(device), residual.to(device))
    assert y.dtype == dtype
    expected = reference_linear(x, weight, bias) + residual.float()
    # y may be rounded before the residual is added, and again with it.
    assert (y.cpu().float() - expected).norm() <= 2 * MAX_ERROR[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_generic_backend_matches_reference(dtype: torch.dtype, bits: int) -> None:
    weight = random_weight(33, 200, bits=bits, group_size=48, act_order=True)
    x, bias = random_inputs(5, 200, dtype=dtype), torch.randn(33)
    packed = generic.pack(make_uniform(weight, generic.CONTAINERS), dtype)
    assert packed.bits == {2: 2, 3: 4, 4: 4}.get(bits, 8)
    y = generic.linear(*arguments(x, packed, bias))
    assert y.dtype == dtype
    assert relative_error(y, x, weight, bias) <= MAX_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code_type", BITS)
def test_generic_backend_serves_every_code_type(dtype: torch.dtype, code_type: CodeType) -> None:
    weight = scaled_down(random_weight(33, 200, bits=BITS[code_type], code_type=code_type))
    x, bias = random_inputs(5, 200, dtype=dtype), torch.randn(33)
    packed = generic.pack(make_uniform(weight), dtype)
    y = generic.linear(*arguments(x, packed, bias))
    # Few large elements may count, each rounded by up to half a unit in the last place.
    limit = max(MAX_ERROR[dtype], torch.finfo(dtype).eps / 2)
    assert relative_error(y, x, weight, bias) <= limit


def scaled_down(weight: QuantizedWeight) -> QuantizedWeight:
    """The same with results within float16."""
    largest = weight.dequantize().abs().max()
    return replace(weight, scales=weight.scales / largest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("code_type", BITS)
def test_op_serves_every_code_type(device: str, code_type: CodeType) -> None:
    weight = random_weight(96, 320, bits=BITS[code_type], code_type=code_type, act_order=True)
    packed = pack_weight(to_device(weight, device), torch.bfloat16)
    x = random_inputs(7, 320, dtype=torch.bfloat16).to(device)
    torch.library.opcheck(
        torch.ops.quantkit.wna16_linear.default,
        arguments(x, packed, None),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    y = wna16_linear(x, packed)
    # A weight's number may be rounded to bfloat16, as y is.
    assert relative_error(y.cpu(), x.cpu(), weight) <= 2 * MAX_ERROR[torch.bfloat16]


def test_refuses_code_types_in_other_containers() -> None:
    weight = random_weight(32, 64, bits=4, code_type="nf4")
    packed = replace(pack_weight(weight, torch.float32), code_type="e4m3")
    message = (
        "codes of type e4m3 in 4 bits are not served; use int, or one of e4m3 in 8, .*fp4 in 4"
    )
    with pytest.raises(ValueError, match=message):
        wna16_linear(torch.randn(1, 64), packed)


@pytest.mark.parametrize("code_type", BITS)
def test_padding_is_zero(code_type: CodeType) -> None:
    uniform = make_uniform(random_weight(3, 100, bits=BITS[code_type], code_type=code_type))
    assert uniform.code_type == code_type
    padding = uniform.codes[:, 100:].long()
    assert padding.numel()
    assert not code_values(code_type)[padding].any()


def test_op_compiles_without_graph_breaks() -> None:
    packed = pack_weight(random_weight(32, 64, group_size=32), torch.float32)

    def twice(x: Tensor) -> Tensor:
        return wna16_linear(x, packed) * 2

    x = torch.randn(3, 64)
    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), twice(x))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.randn(2, 63), None, "x has 63 channels, but the weight takes 64"),
        (torch.randn(2, 64), torch.randn(31), r"bias has shape \(31,\), expected \(32,\)"),
        (torch.randn(2, 64).double(), None, "activations of torch.float64 are not served"),
    ],
)
def test_refusals(x: Tensor, bias: Tensor | None, message: str) -> None:
    packed = pack_weight(random_weight(32, 64, group_size=32), torch.float32)
    with pytest.raises(ValueError, match=message):
        wna16_linear(x, packed, bias)


def test_refuses_a_residual_of_another_shape() -> None:
    packed = pack_weight(random_weight(32, 64, group_size=32), torch.float32)
    message = r"residual has shape \(2, 32\), expected \(3, 32\)"
    with pytest.raises(ValueError, match=message):
        wna16_linear(torch.randn(3, 64), packed, residual=torch.randn(2, 32))


def test_refuses_containers_of_no_device() -> None:
    packed = pack_weight(random_weight(32, 64, group_size=32), torch.float32)
    with pytest.raises(ValueError, match="codes of 3 bits are not served"):
        wna16_linear(torch.randn(1, 64), replace(packed, bits=3))


def test_pack_refuses_dtype_and_group_index() -> None:
    weight = random_weight(32, 64, group_size=32)
    with pytest.raises(ValueError, match=r"activations of torch\.float64 are not served"):
        pack_weight(weight, torch.float64)
    lost = QuantizedWeight(weight.codes, weight.scales[:, :1], weight.zeros, weight.group_index, 4)
    with pytest.raises(ValueError, match=r"group_index spans 0 .. 1, but .* groups 0 .. 0"):
        pack_weight(lost, torch.float32)


def test_nbytes_is_close_to_the_bits() -> None:
    packed = pack_weight(random_weight(1024, 1024, symmetric=True), torch.bfloat16)
    assert packed.nbytes <= 1024 * 1024 * (4 + 32 / 128) / 8


@st.composite
def any_weights(draw: st.DrawFn) -> QuantizedWeight:
    """Weights with groups of any sizes in any order, some of them empty."""
    groups = draw(st.integers(1, 6))
    channels = draw(st.integers(1, 300))
    index = draw(st.lists(st.integers(0, groups - 1), min_size=channels, max_size=channels))
    weight = random_weight(draw(st.integers(1, 5)), channels, group_size=channels)
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    rows = weight.codes.shape[0]
    return QuantizedWeight(
        weight.codes,
        torch.rand(rows, groups, generator=seed) + 0.1,
        torch.randint(0, 17, (rows, groups), dtype=torch.uint8, generator=seed),
        torch.tensor(index, dtype=torch.int32),
        4,
    )


def dequantized(weight: QuantizedWeight) -> Tensor:
    """The weight that `make_uniform` stands for, with its columns back in place."""
    uniform = make_uniform(weight)
    columns = uniform.codes.shape[1]
    repeat = uniform.group_size
    scales = uniform.scales.repeat_interleave(repeat, 1)
    zeros = uniform.zeros.repeat_interleave(repeat, 1).float()
    identity = gather_inputs(torch.eye(uniform.in_features), uniform.gather, columns)
    return (scales * (uniform.codes.float() - zeros)) @ identity.T


@settings(deadline=None)
@given(weight=any_weights())
def test_uniform_weight_is_the_same_weight(weight: QuantizedWeight) -> None:
    torch.testing.assert_close(dequantized(weight), weight.dequantize(), rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(weight=any_weights())
def test_uniform_weight_has_equal_groups(weight: QuantizedWeight) -> None:
    uniform = make_uniform(weight)
    columns = uniform.codes.shape[1]
    assert uniform.group_size in GROUP_SIZES
    assert columns == uniform.scales.shape[1] * uniform.group_size
    counts = torch.bincount(weight.group_index).tolist()
    least = sum(-(-count // 16) * 16 for count in counts)
    assert least <= columns <= max(least, least * PADDING_ALLOWANCE)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_regular_groups_need_no_gather(group_size: int) -> None:
    uniform = make_uniform(random_weight(4, 4 * group_size, group_size=group_size))
    assert uniform.group_size == max(g for g in GROUP_SIZES if group_size % g == 0)
    assert uniform.gather is None


def test_reference_is_the_definition() -> None:
    weight = random_weight(3, 20, group_size=8, act_order=True)
    x, bias = torch.randn(2, 20), torch.randn(3)
    expected = bias.expand(2, 3).clone()
    for n in range(3):
        for k in range(20):
            group = int(weight.group_index[k])
            code = int(weight.codes[n, k]) - int(weight.zeros[n, group])
            expected[:, n] += x[:, k] * weight.scales[n, group] * code
    torch.testing.assert_close(reference_linear(x, weight, bias), expected)
