"""8-bit weights and activations on CUDA without a GPU: packing, tiles, kernels interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit_kernels.act_quant.rows import PER_TENSOR, PER_TOKEN, RowQuantizer, Rows, join_rows
from quantkit_kernels.scaled_mm import reference_scaled_linear
from quantkit_kernels.scaled_mm import triton as backend
from quantkit_kernels.scaled_mm.triton_launch import run_tiled
from quantkit_kernels.scaled_mm.triton_tiles import ScaledTile, select_scaled_tile
from quantkit_kernels.tuning import Device
from tests.kernels.interpreted import (
    error,
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)
from tests.kernels.scaled_mm_triton_cases import (
    ASYMMETRIC_ROWS,
    FP8_ROWS,
    FP32_ERROR,
    INT8_ROWS,
    check,
    operands,
    random_rows,
    random_weight,
    run,
)

FP16_ERROR = 4e-4
"""y is rounded to 11 bits, 2.1e-4; the products and sums before that are those of fp32."""


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@interpreter
@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@interpreter
@in_interpreter
@pytest.mark.parametrize("m", [1, 16, 17, 33, 65, 129])
@pytest.mark.parametrize(
    ("code_type", "quantizer"), [("int", ASYMMETRIC_ROWS), ("e4m3", FP8_ROWS)], ids=["int8", "fp8"]
)
def test_any_number_of_tokens(code_type: str, quantizer: RowQuantizer, m: int) -> None:
    check(m, random_weight(code_type, 72, 256), quantizer)


@interpreter
@in_interpreter
@pytest.mark.parametrize(("n", "k"), [(1, 128), (7, 96), (130, 200), (64, 1040), (192, 131)])
@pytest.mark.parametrize(
    ("code_type", "quantizer"),
    [("int", INT8_ROWS), ("int", ASYMMETRIC_ROWS), ("e4m3", FP8_ROWS), ("e5m2", FP8_ROWS)],
    ids=["int8", "int8-asym", "e4m3", "e5m2"],
)
def test_ragged_shapes(code_type: str, quantizer: RowQuantizer, n: int, k: int) -> None:
    check(3, random_weight(code_type, n, k), quantizer, torch.randn(n) * 100)


@interpreter
@in_interpreter
@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("quantizer", [INT8_ROWS, ASYMMETRIC_ROWS], ids=["symmetric", "zeros"])
def test_weights_with_zero_points(quantizer: RowQuantizer, m: int) -> None:
    check(m, random_weight("int", 130, 200, symmetric=False), quantizer, torch.randn(130) * 100)


@interpreter
@in_interpreter
@pytest.mark.parametrize("m", [5, 40, 70])
@pytest.mark.parametrize("n", [72, 200])
def test_blocks(n: int, m: int) -> None:
    weight = random_weight("e4m3", n, 300, 128, blocks=True)
    packed = backend.pack(weight, RowQuantizer("e4m3", 128), torch.float16)
    assert packed.scales.shape == (3, -(-n // 128))
    check(m, weight, RowQuantizer("e4m3", 128), torch.randn(n) * 100)


@interpreter
@in_interpreter
@pytest.mark.parametrize("m", [5, 70])
@pytest.mark.parametrize("row_group", [True, False], ids=["groups", "rows"])
@pytest.mark.parametrize(("group", "k"), [(128, 384), (128, 300), (32, 96), (192, 400), (256, 512)])
def test_groups(group: int, k: int, row_group: bool, m: int) -> None:
    quantizer = RowQuantizer("e4m3", group if row_group else PER_TENSOR)
    check(m, random_weight("e4m3", 72, k, group), quantizer, torch.randn(72) * 100)


@interpreter
@in_interpreter
def test_one_group_spans_the_row() -> None:
    check(5, random_weight("e4m3", 72, 128, 128), RowQuantizer("e4m3", 128))


@interpreter
@in_interpreter
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("code_type", "quantizer", "group"),
    [("int", ASYMMETRIC_ROWS, None), ("e5m2", RowQuantizer("e4m3", 128), 128)],
    ids=["int8-zeros", "fp8-groups"],
)
@pytest.mark.parametrize("tile", [(16, 64, True), (128, 128, False)], ids=["swap", "plain"])
def test_splits_agree(
    tile: tuple[int, int, bool],
    code_type: str,
    quantizer: RowQuantizer,
    group: int | None,
    splits: int,
) -> None:
    weight = random_weight(code_type, 72, 640, group, symmetric=code_type != "int")
    packed = backend.pack(weight, quantizer, torch.float16)
    rows, bias, residual = (
        random_rows(packed.quantizer, 5, 640),
        torch.randn(72) * 100,
        torch.randn(5, 72),
    )
    cut = ScaledTile(tile[0], tile[1], 128, 4, 4, splits, tile[2])
    results = []
    for _ in range(2):
        room = torch.empty(7, 72, dtype=torch.float32)
        run_tiled(operands(rows, packed, bias, residual), room[1:-1], cut)
        assert room[0].isnan().all()
        assert room[-1].isnan().all()
        results.append(room[1:-1])
    expected = reference_scaled_linear(rows, weight, packed.quantizer, bias, residual)
    assert error(results[0], expected) <= FP32_ERROR
    assert torch.equal(*results)


@interpreter
@in_interpreter
def test_integer_sums_are_exact_where_zero_points_cancel_them() -> None:
    """x - z is small where its codes are not: the difference must be made in integers."""
    weight = random_weight("int", 64, 512)
    weight = replace(weight, codes=weight.codes | 0x80, scales=torch.ones(64, 1))
    codes = torch.randint(125, 128, (2, 512)).to(torch.int8)
    rows = join_rows(Rows(codes, torch.ones(2, 1), torch.full((2,), 126.0), 512))
    y = run(rows, backend.pack(weight, ASYMMETRIC_ROWS, torch.float32), None, torch.float32)
    exact = (codes.long() - 126) @ (weight.codes.long() - 128).T
    assert torch.equal(y, exact.float())


@interpreter
@in_interpreter
def test_results_in_half_precision() -> None:
    weight = random_weight("e4m3", 72, 256)
    weight = replace(weight, scales=weight.scales * 1e-4)
    rows = random_rows(FP8_ROWS, 5, 256)
    y = run(rows, backend.pack(weight, FP8_ROWS, torch.float16), None, torch.float16)
    assert y.dtype == torch.float16
    assert error(y, reference_scaled_linear(rows, weight, FP8_ROWS)) <= FP16_ERROR


@interpreter
@in_interpreter
def test_no_tokens() -> None:
    packed = backend.pack(random_weight("int", 64, 128), INT8_ROWS, torch.float16)
    rows = torch.empty(0, INT8_ROWS.layout(128).stride, dtype=torch.uint8)
    assert run(rows, packed, None, torch.float16).shape == (0, 64)


def test_padding_has_the_value_0() -> None:
    weight = random_weight("int", 130, 200)
    packed = backend.pack(weight, ASYMMETRIC_ROWS, torch.float16)
    assert packed.codes.shape == (256, 256)
    assert packed.codes.dtype == torch.int8
    assert torch.equal(packed.codes[:130, :200].int() + 128, weight.codes.int())
    assert not packed.codes[130:].any()
    assert not packed.codes[:, 200:].any()
    assert packed.scales.shape == (1, 256)
    assert torch.equal(packed.sums[:130].long(), (weight.codes.long() - 128).sum(1))


def test_a_gpu_without_fp8_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "device_of", lambda _: Device(80, 108, 163 * 1024, "A100"))
    with pytest.raises(ValueError, match=r"capability 8\.0 has no FP8 tensor cores"):
        backend.pack(random_weight("e4m3", 64, 128), FP8_ROWS, torch.float16)
    assert backend.pack(random_weight("int", 64, 128), INT8_ROWS, torch.float16).sums is None


def test_short_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 48 channels"):
        backend.pack(random_weight("e4m3", 64, 96, 48), FP8_ROWS, torch.float16)


@given(
    st.integers(1, 100000),
    st.integers(1, 40000),
    st.integers(1, 30000),
    st.sampled_from([32, 64, 128]),
    st.booleans(),
    st.sampled_from([(80, 108, 163), (89, 142, 99), (90, 132, 227), (100, 148, 227)]),
)
def test_every_tile_can_run(
    m: int, n: int, k: int, block_k: int, grouped: bool, gpu: tuple[int, int, int]
) -> None:
    device = Device(gpu[0], gpu[1], gpu[2] * 1024, "any")
    tile = select_scaled_tile(m, n, k, block_k, grouped, device)
    steps = -(-k // block_k)
    per_split = -(-steps // tile.splits)
    assert (tile.splits - 1) * per_split < steps, "a split without steps"
    assert tile.splits * m * 4 * 2 <= k or tile.splits == 1, "sums outweigh weights"
    assert tile.stages >= 2
    assert tile.block_m >= min(m, 128)
    assert tile.block_k == block_k


def test_rows_of_one_scale_need_no_steps_of_their_own() -> None:
    assert backend.kernel_groups(RowQuantizer("e4m3", PER_TOKEN), 256, 128) == (0, 128)
    assert backend.kernel_groups(RowQuantizer("e4m3", 128), 256, 128) == (128, 128)
    assert backend.kernel_groups(RowQuantizer("e4m3", 128), 128, 128) == (0, 0)
    assert backend.block_k(0, 0) == 128
    assert backend.block_k(0, 96) == 32
