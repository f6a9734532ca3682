"""How `select_tile` cuts products of 16-bit activations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit_kernels.tuning import Device
from quantkit_kernels.wna16.triton_tiles import DENSE_TOKENS, select_tile

H200 = Device(90, 132, 227 * 1024, "NVIDIA H200")


@given(
    st.integers(1, 5000),
    st.integers(1, 40000),
    st.integers(1, 240),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 32, 64, 128, "row"]),
    st.sampled_from([(80, 108, 163), (89, 142, 99), (90, 132, 227), (100, 148, 227)]),
    st.booleans(),
)
def test_every_tile_can_run(
    m: int,
    n: int,
    k_tiles: int,
    bits: int,
    group: int | str,
    gpu: tuple[int, int, int],
    code_book: bool,
) -> None:
    device = Device(gpu[0], gpu[1], gpu[2] * 1024, "any")
    columns = 128 * k_tiles
    group_size = columns if group == "row" else int(group)
    tile = select_tile(m, n, columns, bits, group_size, device, code_book=code_book)
    assert 1 <= tile.splits <= k_tiles
    per_split = -(-k_tiles // tile.splits)
    assert (tile.splits - 1) * per_split < k_tiles, "a split without k tiles"
    assert tile.splits == 1 or tile.splits * m * n < 2**31, "offsets are 32 bits"
    assert tile.scale_weights or group_size >= 128
    assert tile.stages >= 2
    assert tile.block_m >= min(m, 64 if code_book and gpu[0] < 90 else 128)
    assert tile.dense == (m >= DENSE_TOKENS)


@pytest.mark.parametrize(
    ("m", "n", "block"),
    [
        (1, 28672, (16, 128)),
        (1, 1024, (16, 64)),
        (17, 28672, (32, 128)),
        (64, 28672, (64, 128)),
        (128, 28672, (128, 128)),
        (256, 28672, (256, 128)),
        (512, 4096, (128, 128)),
        (512, 14336, (256, 128)),
    ],
)
def test_large_blocks_where_they_fill_the_gpu(m: int, n: int, block: tuple[int, int]) -> None:
    tile = select_tile(m, n, 4096, 4, 128, H200)
    assert (tile.block_m, tile.block_n) == block
