"""The kernels of the 4-bit cache compile for every GPU generation, in few instructions."""

from __future__ import annotations

import os

import pytest

from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.triton_tiles import decode_tile, prefill_tile
from quantkit_kernels.tuning import Device
from tests.kernels import kv_int4_builds as builds
from tests.kernels.aot import DEVICES, Compiled

AMPERE, ADA, HOPPER, BLACKWELL = DEVICES
TENSOR_CORES = {80: {"HMMA"}, 89: {"HMMA"}, 90: {"HMMA", "HGMMA"}, 100: {"HMMA", "UTCHMMA"}}

LANE_OPS = {
    (64, 4): 3.94,
    (96, 4): 4.29,
    (128, 4): 2.99,
    (128, 16): 4.68,
    (256, 4): 2.83,
}
"""(head size, query heads of a group) to instructions per key or value and lane, on sm_90."""

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="TRITON_INTERPRET=1 turns the compiler off; unset it to run these tests.",
    ),
]


def layout_of(head_size: int) -> CacheLayout:
    return CacheLayout(head_size, 128, value_columns=True)


def check(compiled: Compiled, arch: int, shared_bytes: int) -> None:
    """No spill, tensor cores, and room in shared memory."""
    assert compiled.stack == 0
    assert compiled.local == 0
    assert not {"LDL", "STL"} & set(compiled.opcodes)
    assert TENSOR_CORES[arch] & set(compiled.opcodes)
    assert compiled.shared <= shared_bytes


@pytest.mark.parametrize(("size", "group"), LANE_OPS)
def test_decoding_leaves_the_memory_as_the_limit(size: int, group: int) -> None:
    """An H200 issues 4.2 instructions per value of 4.375 bits in the time it takes to read it."""
    layout = layout_of(size)
    tile = decode_tile(group, layout, HOPPER, exact=False)
    compiled = builds.decode(layout, group, tile, "bf16", 90)
    check(compiled, 90, HOPPER.shared_bytes)
    if tile.tokens == 128:
        assert compiled.main_loop["LDG"] == 0, "a load in the loop is not asynchronous"
    assert builds.lane_ops(compiled, layout, tile) <= LANE_OPS[size, group] * 1.05
    if (size, group) == (128, 4):
        assert builds.lane_ops(compiled, layout, tile) <= 3.5


@pytest.mark.parametrize(("device", "size", "rows", "dtype"), [
    (AMPERE, 128, 8, "bf16"),
    (ADA, 128, 32, "fp16"),
    (HOPPER, 192, 16, "fp16"),
    (BLACKWELL, 128, 32, "bf16"),
], ids=str)  # fmt: skip
def test_decoding_compiles_for_all(device: Device, size: int, rows: int, dtype: str) -> None:
    layout = layout_of(size)
    tile = decode_tile(rows, layout, device, exact=False)
    arch = device.capability
    compiled = builds.decode(layout, 8, tile, dtype, arch, many=rows > 8, window=99, capped=True)
    check(compiled, arch, device.shared_bytes)


def test_decoding_float32_compiles() -> None:
    layout = layout_of(128)
    tile = decode_tile(4, layout, ADA, exact=True)
    compiled = builds.decode(layout, 4, tile, "fp32", 89)
    assert compiled.stack == 0
    assert compiled.shared <= ADA.shared_bytes


@pytest.mark.parametrize(("device", "size"), [
    (AMPERE, 128), (ADA, 80), (HOPPER, 256), (BLACKWELL, 64),
], ids=str)  # fmt: skip
def test_what_is_around_compiles(device: Device, size: int) -> None:
    layout, arch = layout_of(size), device.capability
    for compiled in (
        builds.writing(layout, "bf16", arch, treated=True),
        builds.rotation(layout, 8, "fp16", arch),
        builds.merge(layout, 8, "bf16", arch),
    ):
        check(compiled, arch, device.shared_bytes)
    assert builds.gathering(layout, "bf16", arch).stack == 0


@pytest.mark.parametrize(("device", "size", "rows"), [
    (AMPERE, 128, 16), (ADA, 64, 4096), (HOPPER, 128, 4096), (HOPPER, 128, 16),
    (BLACKWELL, 128, 4096),
], ids=str)  # fmt: skip
def test_prefilling_compiles(device: Device, size: int, rows: int) -> None:
    layout, arch = layout_of(size), device.capability
    compiled = builds.prefilling(layout, 4, prefill_tile(rows, layout, exact=False), "bf16", arch)
    assert compiled.shared <= device.shared_bytes
    assert TENSOR_CORES[arch] & set(compiled.opcodes)
    assert not {"LDL", "STL"} & set(compiled.main_loop)
    # Where the accumulators of 128 rows are rotated, once, a word or two may not fit.
    assert compiled.stack <= 8
