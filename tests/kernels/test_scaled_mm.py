"""The op `quantkit::scaled_linear` and what every backend has in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit_kernels.act_quant import quantize_rows, reference_quantize
from quantkit_kernels.act_quant.rows import PER_TENSOR, RowQuantizer, join_rows, split_rows
from quantkit_kernels.code_types import CodeType, code_values
from quantkit_kernels.scaled_mm import (
    ScaledWeight,
    generic,
    pack_scaled,
    reference_scaled_linear,
    scaled_linear,
)
from quantkit_kernels.wna16 import QuantizedWeight
from tests.kernels.scaled_mm_cases import (
    MAX_ERROR,
    random_rows,
    random_scaled_weight,
    relative_error,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

INT8, ASYMMETRIC = RowQuantizer("int8"), RowQuantizer("int8", symmetric=False)
E4M3, BLOCKS = RowQuantizer("e4m3"), RowQuantizer("e4m3", 32)
PAIRS = [("int", INT8), ("int", ASYMMETRIC), ("int", RowQuantizer("int8", PER_TENSOR))]
PAIRS += [(code_type, quantizer) for code_type in ("e4m3", "e5m2") for quantizer in (E4M3, BLOCKS)]


@pytest.fixture(autouse=True)
def _only_devices_present(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def weight_for(
    code_type: CodeType, quantizer: RowQuantizer, n: int = 48, k: int = 96
) -> QuantizedWeight:
    group_size = quantizer.group_size if quantizer.group_size > 0 else None
    return random_scaled_weight(n, k, code_type, group_size)


def to_device(weight: QuantizedWeight, device: str) -> QuantizedWeight:
    tensors = {name: getattr(weight, name).to(device) for name in ("codes", "scales", "zeros")}
    return replace(weight, **tensors, group_index=weight.group_index.to(device))


def arguments(
    rows: Tensor,
    weight: ScaledWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> tuple[object, ...]:
    """Of the op, in order."""
    return (
        rows,
        weight.codes,
        weight.scales,
        weight.sums,
        bias,
        weight.code_type,
        weight.quantizer.code,
        weight.quantizer.group_size,
        weight.group_size,
        weight.in_features,
        weight.out_features,
        dtype,
        residual,
        weight.zeros,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("code_type", "quantizer"), PAIRS)
def test_opcheck(
    device: str, dtype: torch.dtype, code_type: CodeType, quantizer: RowQuantizer
) -> None:
    weight = weight_for(code_type, quantizer)
    packed = pack_scaled(to_device(weight, device), quantizer, dtype)
    rows = random_rows(6, 96, quantizer)
    bias = torch.randn(48, dtype=dtype, device=device)
    for shaped in (rows, rows.unflatten(0, (2, 3)), rows[:0]):
        residual = torch.randn(*shaped.shape[:-1], 48, dtype=dtype, device=device)
        torch.library.opcheck(
            torch.ops.quantkit.scaled_linear.default,
            arguments(shaped.to(device), packed, bias, dtype, residual),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("code_type", "quantizer"), PAIRS)
def test_op_matches_reference(
    device: str, dtype: torch.dtype, code_type: CodeType, quantizer: RowQuantizer
) -> None:
    weight = weight_for(code_type, quantizer, 96, 320)
    packed = pack_scaled(to_device(weight, device), quantizer, dtype)
    rows, bias = random_rows(14, 320, quantizer).unflatten(0, (2, 7)), torch.randn(96) * 100
    residual = torch.randn(2, 7, 96, dtype=dtype) * 100
    for added in (None, residual):
        given = None if added is None else added.to(device)
        y = scaled_linear(rows.to(device), packed, dtype, bias.to(device, dtype), given)
        assert y.dtype == dtype
        error = relative_error(y.cpu(), rows, weight, quantizer, bias.to(dtype), added)
        assert error <= MAX_ERROR[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantizer", [INT8, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_weights_with_zero_points(quantizer: RowQuantizer, device: str) -> None:
    """Sums of products and of codes are large where their difference is small: it is exact."""
    weight = random_scaled_weight(48, 320)
    weight = replace(weight, codes=weight.codes | 0xF0, zeros=weight.codes[:, :1] | 0xF0)
    packed = pack_scaled(to_device(weight, device), quantizer, torch.float32)
    assert packed.quantizer == replace(quantizer, sum_group=320)
    x = torch.randn(5, 320)
    rows = join_rows(reference_quantize(x, packed.quantizer))
    y = scaled_linear(rows.to(device), packed, torch.float32)
    assert relative_error(y.cpu(), rows, weight, packed.quantizer) <= MAX_ERROR[torch.float32]
    assert torch.equal(quantize_rows(x.to(device), packed.quantizer).cpu(), rows)
    torch.library.opcheck(
        torch.ops.quantkit.scaled_linear.default,
        arguments(rows.to(device), packed, None, torch.float32),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("code_type", "quantizer"), PAIRS)
def test_generic_backend_matches_reference(
    dtype: torch.dtype, code_type: CodeType, quantizer: RowQuantizer
) -> None:
    weight = weight_for(code_type, quantizer, 33, 200)
    rows, bias = random_rows(5, 200, quantizer), torch.randn(33)
    packed, residual = generic.pack(weight, quantizer, dtype), torch.randn(5, 33)
    _, codes, scales, sums, _, *shape, _, zeros = arguments(rows, packed, bias, dtype)
    y = generic.linear(rows, codes, scales, sums, zeros, bias, residual, *shape)
    assert y.dtype == dtype
    assert relative_error(y, rows, weight, quantizer, bias, residual) <= MAX_ERROR[dtype]


def test_generic_backend_takes_zero_points_off_weights() -> None:
    weight = random_scaled_weight(33, 200)
    weight = replace(weight, zeros=torch.arange(33, dtype=torch.uint8)[:, None])
    packed = generic.pack(weight, INT8, torch.float32)
    rows = random_rows(5, 200, packed.quantizer)
    _, codes, scales, sums, _, *shape, _, zeros = arguments(rows, packed, None, torch.float32)
    y = generic.linear(rows, codes, scales, sums, zeros, None, None, *shape)
    assert relative_error(y, rows, weight, packed.quantizer) <= MAX_ERROR[torch.float32]


def test_op_compiles_without_graph_breaks() -> None:
    packed = pack_scaled(weight_for("int", INT8), INT8, torch.float32)

    def twice(rows: Tensor) -> Tensor:
        return scaled_linear(rows, packed, torch.float32) * 2

    rows = random_rows(3, 96, INT8)
    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    assert torch.equal(compiled(rows), twice(rows))


def test_reference_is_the_definition() -> None:
    for code_type, quantizer in PAIRS:
        weight = weight_for(code_type, quantizer, 3, 40)
        rows, bias = random_rows(2, 40, quantizer), torch.randn(3)
        parts = split_rows(rows, quantizer, 40)
        expected = bias.expand(2, 3).clone()
        for k in range(40):
            x = parts.scales[:, k // parts.group_size] * (parts.codes[:, k].float() - parts.zeros)
            code = weight.codes[:, k].long()
            value = code.float() - 128 if code_type == "int" else code_values(code_type)[code]
            expected += torch.outer(x, value * weight.scales[:, int(weight.group_index[k])])
        # float32 sums in another order: values reach 57344 * 448.
        torch.testing.assert_close(
            reference_scaled_linear(rows, weight, quantizer, bias), expected, rtol=1e-5, atol=1.0
        )
        assert torch.equal(join_rows(parts), rows)


WEIGHT = random_scaled_weight(32, 64)
BLOCK_WEIGHT = random_scaled_weight(32, 64, "e4m3", 32)


@pytest.mark.parametrize(
    ("weight", "quantizer", "message"),
    [
        (WEIGHT, E4M3, "weights of int with rows of e4m3 are not served; use int with int8"),
        (BLOCK_WEIGHT, INT8, "weights of e4m3 with rows of int8 are not served"),
        (replace(WEIGHT, bits=4), INT8, "weights of 4 bits are not served with 8-bit rows; use 8"),
        (random_scaled_weight(32, 64, "int", 32), INT8, "2 scales per output channel"),
        (WEIGHT, RowQuantizer("int8", 32), "rows in groups of 32 .* weight in groups of 64"),
        (BLOCK_WEIGHT, RowQuantizer("e4m3", 16), "rows in groups of 16 .* in groups of 32"),
        (random_scaled_weight(32, 64, "e4m3", 24), E4M3, "groups of 24 channels are not served"),
        (
            replace(BLOCK_WEIGHT, group_index=BLOCK_WEIGHT.group_index.flip(0)),
            E4M3,
            "the group index is not channel // group size",
        ),
    ],
)
def test_pack_refuses(weight: QuantizedWeight, quantizer: RowQuantizer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_scaled(weight, quantizer, torch.float32)


def test_pack_refuses_dtype_and_too_many_channels() -> None:
    with pytest.raises(ValueError, match=r"results of torch\.float64 are not served"):
        pack_scaled(WEIGHT, INT8, torch.float64)
    with pytest.raises(ValueError, match="65537 input channels are more than the 65536 served"):
        pack_scaled(random_scaled_weight(1, 65537), INT8, torch.float32)
    weight = random_scaled_weight(1, 32769)
    with pytest.raises(ValueError, match="32769 input channels are more than the 32768 served"):
        pack_scaled(replace(weight, zeros=weight.zeros - 1), ASYMMETRIC, torch.float32)


@pytest.mark.parametrize(
    ("rows", "bias", "dtype", "message"),
    [
        (torch.zeros(2, 79).byte(), None, torch.float32, "rows have 79 bytes, but 64 channels"),
        (torch.zeros(2, 80), None, torch.float32, r"rows are torch\.float32, expected"),
        (torch.zeros(2, 80).byte(), torch.zeros(31), torch.float32, r"bias has shape \(31,\)"),
        (torch.zeros(2, 80).byte(), None, torch.int8, r"results of torch\.int8 are not served"),
    ],
)
def test_refusals(rows: Tensor, bias: Tensor | None, dtype: torch.dtype, message: str) -> None:
    packed = pack_scaled(WEIGHT, INT8, torch.float32)
    with pytest.raises(ValueError, match=message):
        scaled_linear(rows, packed, dtype, bias)


def test_a_residual_of_another_shape_is_refused() -> None:
    packed = pack_scaled(WEIGHT, INT8, torch.float32)
    rows = torch.zeros(2, 80).byte()
    with pytest.raises(ValueError, match=r"residual has shape \(1, 32\), expected \(2, 32\)"):
        scaled_linear(rows, packed, torch.float32, residual=torch.zeros(1, 32))


def test_nbytes_is_close_to_the_bits() -> None:
    packed = pack_scaled(random_scaled_weight(1024, 1024), INT8, torch.bfloat16)
    assert packed.nbytes <= 1024 * 1024 + 2 * 4 * 1024
