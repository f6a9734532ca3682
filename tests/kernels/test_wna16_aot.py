"""The W4 and W8 kernels compile for every GPU generation, without spills, in few instructions."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import product

import pytest

from quantkit_kernels.triton_common import SUM_BLOCK, sum_splits
from quantkit_kernels.tuning import Device
from quantkit_kernels.wna16 import triton_kernels
from quantkit_kernels.wna16.triton import DENSE_WARPS
from quantkit_kernels.wna16.triton_tiles import TileConfig, select_tile
from quantkit_kernels.wna16.weights import CONTAINER_OF
from tests.kernels.aot import DEVICES, Compiled, compile_kernel

HOPPER = DEVICES[2]
TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
WEIGHTS_PER_HGMMA = 64 * 16 // 128

TOKENS = (1, 32, 64, 256)
SHAPES = ((1024, 2048), (4096, 4096), (28672, 8192))
GROUPS = (128, 64, 32, 16)
DTYPES = ("bf16", "fp16")

INSTRUCTIONS = {
    (4, 16, 64): (3.30, 3.89, 4.08, 4.72),
    (4, 16, 128): (2.51, 3.06, 3.59, 4.08),
    (4, 32, 128): (2.70, 3.18, 3.43, 3.93),
    (4, 64, 128): (3.47, 3.59, 3.87, 4.39),
    (4, 128, 128): (4.34, 4.45, 4.62, 5.36),
    (8, 16, 64): (4.39, 5.16, 5.62, 6.36),
    (8, 16, 128): (3.58, 4.33, 4.80, 5.59),
    (8, 32, 128): (3.82, 4.26, 4.69, 5.68),
    (8, 64, 128): (4.47, 4.72, 5.09, 5.80),
    (8, 128, 128): (5.61, 5.59, 6.08, 6.69),
}
"""(bits, block_m, block_n) to instructions per weight on sm_90, for each of `GROUPS` in turn."""

CODES = {"e4m3": "bf16", "nf4": "fp16"}
"""Each with one dtype: E4M3 in bfloat16 takes the most instructions."""

CODE_INSTRUCTIONS = {
    ("e4m3", 16): 3.68,
    ("e4m3", 128): 5.62,
    ("nf4", 16): 5.10,
    ("nf4", 128): 7.12,
}
"""(code, block_m) to instructions per weight on sm_90: groups of 128 at 16 tokens, else of 64."""

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="TRITON_INTERPRET=1 turns the compiler off; unset it to run these tests.",
    ),
]


@dataclass(frozen=True)
class Variant:
    """One kernel that some GPU will run."""

    device: Device
    tile: TileConfig
    bits: int
    group: int
    dtype: str
    code: str = "int"

    def __str__(self) -> str:
        tile = f"{self.tile.block_m}x{self.tile.block_n}{'-split' * (self.tile.splits > 1)}"
        name = f"w{self.bits}" if self.code == "int" else self.code
        return f"sm{self.device.capability}-{self.dtype}-{name}-g{self.group}-{tile}"


def tiles(device: Device, bits: int, group: int, *, code_book: bool = False) -> list[TileConfig]:
    """Tiles that `select_tile` picks, one for each size of block."""
    chosen = {}
    for m, (n, columns) in product(TOKENS, SHAPES):
        tile = select_tile(m, n, columns, bits, group, device, code_book=code_book)
        chosen[tile.block_m, tile.block_n] = tile
    return [chosen[block] for block in sorted(chosen)]


def variants(device: Device, rounds: int) -> list[Variant]:
    """Each tile with each width in `rounds` of the group sizes; dtype and splitting take turns."""
    found = []
    for shift, bits, index in product(range(rounds), (4, 8), range(5)):
        group = GROUPS[(index + shift + 3) % 4]
        tile = replace(tiles(device, bits, group)[index], splits=1 + shift % 2)
        found.append(Variant(device, tile, bits, group, DTYPES[(index + bits // 8) % 2]))
    return found


def build(variant: Variant) -> Compiled:
    """Compile `wna16_gemm` as `triton.run_tiled` launches it."""
    split = variant.tile.splits > 1
    constants = {
        "BITS": variant.bits,
        "CODE": variant.code,
        "G": variant.group,
        "BM": variant.tile.block_m,
        "BN": variant.tile.block_n,
        "SCALE": variant.tile.scale_weights,
        "STAGES": variant.tile.stages,
        "ASM": True,
    } | ({"bias_ptr": None} if split else {})
    pointers = ("x_ptr", "codes_ptr", "scales_ptr", "bias_ptr", "out_ptr")
    element = f"*{variant.dtype}"
    return compile_kernel(
        triton_kernels.wna16_gemm,
        types=dict.fromkeys(("M", "N", "k_tiles", "split_tiles"), "i32")
        | dict(zip(pointers, (element, "*i32", "*i32", element, element), strict=True))
        | ({"out_ptr": "*fp32"} if split else {}),
        constants=constants,
        aligned=tuple(name for name in (*pointers, "N") if name not in constants),
        arch=variant.device.capability,
        warps=variant.tile.warps,
    )


ALL = [v for device in DEVICES for v in variants(device, rounds=2 if device is HOPPER else 1)]


@pytest.mark.parametrize("variant", ALL, ids=str)
def test_compiles_without_spills(variant: Variant) -> None:
    compiled = build(variant)
    assert compiled.stack == 0
    assert compiled.local == 0
    assert not {"LDL", "STL"} & set(compiled.opcodes)
    assert compiled.shared <= variant.device.shared_bytes
    loop = compiled.main_loop
    assert loop[TENSOR_CORES[variant.device.capability]] > 0
    assert loop["LDGSTS"] > 0
    if variant.device.capability < 100:
        assert loop["LDG"] == 0, "a load in the loop is not asynchronous"
    if variant.device is HOPPER:
        assert loop["STS"] == 0, "weights go through shared memory"
        assert loop["WARPGROUP"] <= 4, "ptxas serialises wgmma (C7515)"
        assert instructions_per_weight(compiled) <= limit(variant)


def code_variants() -> list[Variant]:
    """Floats and code books with the fewest and the most tokens, where they compile anew."""
    found = []
    for device, (code, dtype), index in product(DEVICES, CODES.items(), (1, -1)):
        if device.capability == 89 and index == 1:
            continue
        bits, group = CONTAINER_OF[code], 128 if index == 1 else 64
        tile = tiles(device, bits, group, code_book=bits == 4)[index]
        found.append(Variant(device, tile, bits, group, dtype, code))
    return found


@pytest.mark.parametrize("variant", code_variants(), ids=str)
def test_other_codes_compile_without_spills(variant: Variant) -> None:
    compiled = build(variant)
    assert compiled.stack == 0
    assert compiled.local == 0
    assert compiled.shared <= variant.device.shared_bytes
    loop = compiled.main_loop
    assert loop[TENSOR_CORES[variant.device.capability]] > 0
    assert loop["LDGSTS"] > 0
    if variant.device is HOPPER:
        assert loop["STS"] == 0, "weights go through shared memory"
        assert loop["WARPGROUP"] <= 4, "ptxas serialises wgmma (C7515)"
        limit = CODE_INSTRUCTIONS[variant.code, variant.tile.block_m]
        assert instructions_per_weight(compiled) <= limit * 1.05


def instructions_per_weight(compiled: Compiled) -> float:
    """Of the main loop, per thread."""
    loop = compiled.main_loop
    return loop.total() / (loop["HGMMA"] * WEIGHTS_PER_HGMMA)


def limit(variant: Variant) -> float:
    """What was recorded, and 5 % more."""
    row = INSTRUCTIONS[variant.bits, variant.tile.block_m, variant.tile.block_n]
    return row[GROUPS.index(variant.group)] * 1.05


def test_small_w4_leaves_the_memory_as_the_limit() -> None:
    """An H200 issues 3.9 instructions per 4-bit weight in the time it takes to read it."""
    row = INSTRUCTIONS[4, 16, 128]
    assert row[0] <= 3.0
    assert max(row[:3]) <= 3.9


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dequantisation_and_sums_compile(dtype: str, arch: int) -> None:
    rows = compile_kernel(
        triton_kernels.dequantise_rows,
        types=dict.fromkeys(("N", "first_tile", "k_tiles"), "i32")
        | {"codes_ptr": "*i32", "scales_ptr": "*i32", "out_ptr": f"*{dtype}"},
        constants={"BITS": 4, "CODE": "nf4", "G": 32, "ASM": True},
        aligned=("codes_ptr", "scales_ptr", "out_ptr", "N"),
        arch=arch,
        warps=DENSE_WARPS,
    )
    sums = compile_kernel(
        sum_splits,
        types=dict.fromkeys(("M", "N", "splits"), "i32")
        | {"partial_ptr": "*fp32", "bias_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"},
        constants={"BLOCK": SUM_BLOCK},
        aligned=("partial_ptr", "bias_ptr", "out_ptr", "N"),
        arch=arch,
        warps=4,
    )
    assert rows.stack == sums.stack == 0
