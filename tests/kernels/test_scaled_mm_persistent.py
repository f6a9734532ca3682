"""The persistent kernel for many tokens, interpreted: descriptors and all, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit_kernels.act_quant.rows import PER_TENSOR, RowQuantizer
from quantkit_kernels.scaled_mm import triton as backend
from quantkit_kernels.scaled_mm import triton_launch
from quantkit_kernels.scaled_mm.triton_launch import run_tiled
from quantkit_kernels.scaled_mm.triton_tiles import (
    NARROW,
    WIDE,
    ScaledTile,
    persistent_refusal,
    select_scaled_tile,
)
from quantkit_kernels.tuning import Device
from tests.kernels.aot import DEVICES
from tests.kernels.interpreted import (
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)
from tests.kernels.scaled_mm_triton_cases import (
    ASYMMETRIC_ROWS,
    FP8_ROWS,
    INT8_ROWS,
    check,
    operands,
    random_rows,
    random_weight,
)

BLOCK_ROWS = RowQuantizer("e4m3", 128)


def persistent(block_n: int, stages: int = 4) -> ScaledTile:
    return ScaledTile(128, block_n, 128, 8, stages, 1, swap=False, persistent=True)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_gpu() -> Iterator[None]:
    """Two multiprocessors, so that a program takes several tiles."""
    device = Device(90, 2, 227 * 1024, "two multiprocessors")
    with patch.object(triton_launch, "device_of", lambda _: device):
        yield


@interpreter
@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@interpreter
@in_interpreter
@pytest.mark.usefixtures("small_gpu")
@pytest.mark.parametrize(("m", "n", "k"), [(130, 264, 200), (257, 130, 384)])
@pytest.mark.parametrize("block_n", [WIDE, NARROW])
@pytest.mark.parametrize(
    ("code_type", "quantizer"),
    [("int", INT8_ROWS), ("int", ASYMMETRIC_ROWS), ("e4m3", FP8_ROWS), ("e5m2", FP8_ROWS)],
    ids=["int8", "int8-asym", "e4m3", "e5m2"],
)
def test_ragged_shapes(
    code_type: str, quantizer: RowQuantizer, block_n: int, m: int, n: int, k: int
) -> None:
    weight = random_weight(code_type, n, k)
    check(m, weight, quantizer, torch.randn(n) * 100, persistent(block_n))


@interpreter
@in_interpreter
@pytest.mark.parametrize("quantizer", [INT8_ROWS, ASYMMETRIC_ROWS], ids=["symmetric", "zeros"])
def test_weights_with_zero_points(quantizer: RowQuantizer) -> None:
    check(130, random_weight("int", 264, 200, symmetric=False), quantizer, None, persistent(WIDE))


@interpreter
@in_interpreter
@pytest.mark.usefixtures("small_gpu")
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "channels"])
@pytest.mark.parametrize(
    "quantizer", [BLOCK_ROWS, RowQuantizer("e4m3", PER_TENSOR)], ids=["g", "t"]
)
@pytest.mark.parametrize(("n", "k"), [(264, 300), (128, 256)])
def test_groups(n: int, k: int, quantizer: RowQuantizer, blocks: bool) -> None:
    """Where channels have scales of their own, the tile runs as one of the other kernel."""
    weight = random_weight("e4m3", n, k, 128, blocks=blocks)
    check(130, weight, quantizer, torch.randn(n) * 100, persistent(NARROW))


@interpreter
@in_interpreter
@settings(max_examples=10, deadline=None)
@given(
    m=st.integers(1, 200),
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    block_n=st.sampled_from([WIDE, NARROW]),
    integers=st.booleans(),
)
def test_any_shape(m: int, n: int, k: int, block_n: int, integers: bool) -> None:
    weight = random_weight("int" if integers else "e4m3", n, k)
    check(m, weight, ASYMMETRIC_ROWS if integers else FP8_ROWS, None, persistent(block_n))


@interpreter
@in_interpreter
@pytest.mark.parametrize(
    ("code_type", "quantizer", "group"),
    [("int", ASYMMETRIC_ROWS, None), ("e4m3", FP8_ROWS, None), ("e4m3", BLOCK_ROWS, 128)],
    ids=["int8", "fp8", "blocks"],
)
@pytest.mark.parametrize(
    "tile",
    [persistent(NARROW), ScaledTile(64, 128, 128, 4, 4, 1, False)],
    ids=["persistent", "64"],
)
def test_a_row_has_the_same_bits_in_every_batch(
    tile: ScaledTile, code_type: str, quantizer: RowQuantizer, group: int | None
) -> None:
    weight = random_weight(code_type, 136, 256, group, blocks=group is not None)
    packed = backend.pack(weight, quantizer, torch.float32)
    rows = random_rows(packed.quantizer, 130, 256)
    room = torch.empty(132, 136)
    run_tiled(operands(rows, packed, None, None), room[1:-1], tile)
    assert room[0].isnan().all()
    assert room[-1].isnan().all()
    for first, last in ((0, 1), (5, 70), (0, 130)):
        part = torch.empty(last - first, 136)
        run_tiled(operands(rows[first:last], packed, None, None), part, tile)
        assert torch.equal(part, room[1 + first : 1 + last])


@given(st.integers(1, 100000), st.integers(1, 40000), st.sampled_from(DEVICES), st.booleans())
def test_many_tiles_take_the_persistent_kernel(
    m: int, n: int, device: Device, grouped: bool
) -> None:
    tile = select_scaled_tile(m, n, 4096, 128, grouped, device)
    enough = 2 * -(-m // 128) * -(-n // 128) > device.multiprocessors
    assert tile.persistent == (device.capability >= 90 and m > 64 and enough)
    if tile.persistent:
        assert persistent_refusal(tile, device) == ""
        assert tile.block_n == NARROW or not grouped
        assert tile.stages >= 4
    assert not select_scaled_tile(m, n, 4096, 128, grouped, device, persistent=False).persistent


def test_what_a_persistent_tile_cannot_be() -> None:
    ampere, hopper = DEVICES[0], DEVICES[2]
    assert "capability 9.0" in persistent_refusal(persistent(WIDE), ampere)
    split = ScaledTile(128, 128, 128, 8, 4, 2, swap=False, persistent=True)
    assert "neither swap nor splits" in persistent_refusal(split, hopper)
    assert persistent_refusal(persistent(WIDE), hopper) == ""
