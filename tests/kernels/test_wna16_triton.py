"""The CUDA backend without a GPU: its kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit_kernels.wna16 import make_uniform, reference_linear
from quantkit_kernels.wna16 import triton as backend
from quantkit_kernels.wna16.triton_tiles import TileConfig, select_tile
from tests.kernels.interpreted import (
    error,
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)
from tests.kernels.wna16_triton_cases import (
    FP16_ERROR,
    FP32_ERROR,
    GROUPS,
    ROUNDED,
    check,
    int_weight,
    packed,
    run,
    run_tile,
)

HALVES = (torch.float16, torch.bfloat16)


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


def tile_of(
    block_m: int = 16, block_n: int = 128, splits: int = 1, *, scale_weights: bool = False
) -> TileConfig:
    return TileConfig(block_m, block_n, 4, 4, splits, scale_weights)


@interpreter
@in_interpreter
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_and_group(bits: int, group: int) -> None:
    symmetric = group in (32, 128)
    weight = int_weight(100, 256, group, bits, symmetric=symmetric)
    packing = packed(weight, torch.float16)
    assert packing.group_size == group
    assert packing.bits == {3: 4}.get(bits, bits)
    assert packing.zero == (2 ** (bits - 1) if symmetric else None)
    check(torch.randn(5, 256).half(), weight, torch.randn(100).half(), FP16_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("dtype", "scale_weights"), [(torch.float16, True), (torch.bfloat16, False)], ids=str
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_with_one_scale_are_exact(
    bits: int, dtype: torch.dtype, scale_weights: bool, symmetric: bool
) -> None:
    weight = int_weight(100, 300, 64, bits, symmetric=symmetric, whole_rows=True)
    packing = packed(weight, dtype)
    assert packing.group_size == 384
    assert packing.scales.shape == (1, 128)
    x = torch.randn(5, 300).to(dtype)
    x, tile = torch.nn.functional.pad(x, (0, 84)), tile_of(scale_weights=scale_weights)
    y = run_tile(x, packing, tile)
    assert error(y, reference_linear(x[:, :300], weight)) <= FP32_ERROR
    if symmetric:
        assert torch.equal(y, run_tile(x, replace(packing, zero=None), tile))


@interpreter
@in_interpreter
@pytest.mark.parametrize("m", [1, 16, 17, 33, 65, 129])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_any_number_of_tokens(bits: int, m: int) -> None:
    weight = int_weight(72, 256, 128, bits)
    check(torch.randn(m, 256).half(), weight, None, FP16_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize(("n", "k"), [(1, 128), (7, 96), (130, 200), (64, 1040), (192, 131)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ragged_shapes(bits: int, n: int, k: int) -> None:
    check(torch.randn(3, k).half(), int_weight(n, k, 32, bits), torch.randn(n), FP16_ERROR)


@interpreter
@in_interpreter
@settings(deadline=None, max_examples=15)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Shape, width, group, order, zero-points and addends drawn independently."""
    m, n = data.draw(st.integers(1, 70), "m"), data.draw(st.integers(8, 200), "n")
    k = data.draw(st.integers(16, 400), "k")
    bits = data.draw(st.sampled_from([2, 3, 4, 8]), "bits")
    group = data.draw(st.sampled_from([*GROUPS, 512]), "group")
    kinds = ("symmetric", "shuffled", "whole_rows")
    drawn = {kind: data.draw(st.booleans(), kind) for kind in kinds}
    bias = torch.randn(n).half() if data.draw(st.booleans(), "bias") else None
    residual = torch.randn(m, n).half() if data.draw(st.booleans(), "residual") else None
    x = torch.randn(m, k).half()
    check(x, int_weight(n, k, group, bits, **drawn), bias, FP16_ERROR, residual)


@interpreter
@in_interpreter
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("m", [2, 40])
def test_channels_in_any_order(bits: int, m: int) -> None:
    weight = int_weight(70, 300, 64, bits, shuffled=True)
    gather = packed(weight, torch.float16).gather
    assert gather is not None
    assert gather.numel() % 128 == 0
    check(torch.randn(m, 300).half(), weight, None, FP16_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("scale_weights", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_splits_agree(bits: int, dtype: torch.dtype, scale_weights: bool, splits: int) -> None:
    weight = int_weight(72, 384, 128, bits)
    packing = packed(weight, dtype)
    tile = tile_of(splits=splits, scale_weights=scale_weights)
    x = torch.randn(5, 384).to(dtype)
    bias, residual = torch.randn(72), torch.randn(5, 72)
    y = run_tile(x, packing, tile, bias=bias, residual=residual)
    limit = ROUNDED[dtype] if scale_weights else FP32_ERROR
    assert error(y, reference_linear(x, weight, bias) + residual) <= limit


@interpreter
@in_interpreter
@pytest.mark.parametrize("splits", [1, 3])
def test_the_same_inputs_give_the_same_bits(splits: int) -> None:
    packing = packed(int_weight(72, 640, 128, 4), torch.float16)
    x, tile = torch.randn(5, 640).half(), tile_of(splits=splits)
    assert torch.equal(run_tile(x, packing, tile), run_tile(x, packing, tile))


@interpreter
@in_interpreter
@pytest.mark.parametrize("scale_weights", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_tile_gives_a_row_the_same_bits_in_every_batch(bits: int, scale_weights: bool) -> None:
    packing = packed(int_weight(72, 384, 128, bits), torch.float16)
    x, residual = torch.randn(40, 384).half(), torch.randn(40, 72).half()
    tile = tile_of(scale_weights=scale_weights)
    whole = run_tile(x, packing, tile, residual=residual)
    for rows in (slice(0, 1), slice(3, 20)):
        assert torch.equal(run_tile(x[rows], packing, tile, residual=residual[rows]), whole[rows])


@interpreter
@in_interpreter
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_small_groups_in_either_dtype(bits: int, group: int, dtype: torch.dtype) -> None:
    weight = int_weight(128, 128, group, bits)
    x = torch.randn(16, 128).to(dtype)
    y = run_tile(x, packed(weight, dtype), tile_of(block_n=64, scale_weights=True))
    assert error(y, reference_linear(x, weight)) <= ROUNDED[dtype]


@interpreter
@in_interpreter
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("group", [16, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_may_lie_in_quads(
    bits: int, group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weight and tokens give the same bits, in whatever order a thread has the codes."""
    weight, x = int_weight(70, 272, group, bits), torch.randn(19, 272, dtype=dtype)
    pairs = packed(weight, dtype)
    expected = run(x, pairs)
    monkeypatch.setattr(backend, "takes_quads", lambda device: True)
    quads = packed(weight, dtype)
    assert not torch.equal(quads.codes, pairs.codes)
    assert torch.equal(run(x, quads), expected)


@interpreter
@in_interpreter
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [*GROUPS, 256])
def test_float32_is_exact(group: int, bits: int) -> None:
    weight = int_weight(100, 256, group, bits, whole_rows=group == 256)
    check(torch.randn(3, 256), weight, torch.randn(100), FP32_ERROR, torch.randn(3, 100))


@interpreter
@in_interpreter
@pytest.mark.parametrize("residual", [None, torch.ones(9, 200)])
@pytest.mark.parametrize("bias", [None, torch.ones(200)])
def test_many_tokens_go_chunk_by_chunk(
    bias: Tensor | None, residual: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = replace(select_tile(9, 200, 384, 4, 64, backend.device_of(torch.ones(1))), dense=True)
    monkeypatch.setattr(backend, "wna16_tile", lambda *_: dense)
    monkeypatch.setattr(backend, "DENSE_CHUNK", 128 * 300)
    monkeypatch.delattr(backend, "run_tiled")
    x = torch.randn(9, 300).half()
    check(x, int_weight(200, 300, 64, 4), bias, FP16_ERROR, residual)


@interpreter
@in_interpreter
def test_no_tokens() -> None:
    packing = packed(int_weight(64, 128, 64, 4), torch.float16)
    assert run(torch.empty(0, 128, dtype=torch.float16), packing).shape == (0, 64)


@interpreter
@in_interpreter
def test_uniform_weights_keep_their_container() -> None:
    assert make_uniform(int_weight(8, 64, 64, 2)).container_bits == 4
    assert make_uniform(int_weight(8, 64, 64, 2), (2, 4, 8)).container_bits == 2
