"""The 8-bit kernel compiles for every GPU generation, without spills, for the tensor cores."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from quantkit_kernels.scaled_mm.triton_kernels import scaled_gemm
from quantkit_kernels.scaled_mm.triton_tiles import ScaledTile, select_scaled_tile
from quantkit_kernels.tuning import Device
from tests.kernels.aot import DEVICES, Compiled, compile_kernel

INTEGER = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA"}
FLOAT8 = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA"}

SMALL_INSTRUCTIONS = 1.5
"""Per weight with up to 16 tokens. An H200 issues 7.8 in the time it takes to read 8 bits."""

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
    tile: ScaledTile
    x: str
    w: str
    x_group: int = 0
    w_group: int = 0
    zeros: bool = False
    ragged: bool = False
    split: bool = False

    def __str__(self) -> str:
        groups = f"-g{self.x_group}x{self.w_group}" if self.w_group else ""
        marks = "-zeros" * self.zeros + "-ragged" * self.ragged + "-split" * self.split
        tile = f"{self.tile.block_m}x{self.tile.block_n}x{self.tile.block_k}"
        return f"sm{self.device.capability}-{self.x}-{self.w}{groups}-{tile}{marks}"


def variant(device: Device, m: int, codes: str, **options: object) -> Variant:
    """The tile for m tokens of a large layer, with rows and weights of types such as `i8 i8`."""
    x, w = codes.split()
    groups = (options.get("x_group", 0), options.get("w_group", 0))
    block_k = next(size for size in (128, 64, 32) if all(g % size == 0 for g in groups))
    tile = select_scaled_tile(m, 8192, 8192, block_k, max(groups) > 0, device)
    return Variant(device, tile, x, w, **options)


def variants(device: Device) -> list[Variant]:
    """The extremes everywhere, and every tile and option on Hopper."""
    float8, mixed = "fp8e4nv fp8e4nv", "fp8e4nv fp8e5"
    found = [
        variant(device, 1, "i8 i8", zeros=True, split=True),
        variant(device, 4096, "i8 i8", zeros=True),
    ]
    if device.capability >= 89:
        found += [
            variant(device, 1, mixed, ragged=True, split=True),
            variant(device, 64, float8, x_group=128, w_group=128, split=True),
            variant(device, 4096, float8, x_group=128, w_group=128),
        ]
    if device.capability == 90:
        found += [
            variant(device, 33, "i8 i8", ragged=True),
            variant(device, 17, float8),
            variant(device, 4096, float8),
            variant(device, 1, float8, x_group=128, w_group=128),
            variant(device, 4096, mixed, w_group=32, ragged=True),
        ]
    return found


def build(v: Variant) -> Compiled:
    """Compile `scaled_gemm` as `triton.run_tiled` launches it."""
    absent = {"bias_ptr": None} if v.split else {}
    absent |= {} if v.zeros else {"sums_ptr": None}
    constants = absent | {
        "X_GROUP": v.x_group,
        "W_GROUP": v.w_group,
        "SCALES_AT": 2048,
        "RAGGED": v.ragged,
        "SWAP": v.tile.swap,
        "BM": v.tile.block_m,
        "BN": v.tile.block_n,
        "BK": v.tile.block_k,
        "STAGES": v.tile.stages,
        "ASM": True,
    }
    types = {
        "x_ptr": f"*{v.x}",
        "x_scales_ptr": "*fp32",
        "codes_ptr": f"*{v.w}",
        "w_scales_ptr": "*fp32",
        "sums_ptr": "*i32",
        "bias_ptr": "*bf16",
        "out_ptr": "*fp32" if v.split else "*bf16",
    }
    return compile_kernel(
        scaled_gemm,
        types=types
        | dict.fromkeys(("M", "N", "K", "x_stride", "w_stride", "k_steps", "split_steps"), "i32"),
        constants=constants,
        aligned=tuple(
            name for name in (*types, "N", "K", "x_stride", "w_stride") if name not in constants
        ),
        arch=v.device.capability,
        warps=v.tile.warps,
    )


@pytest.mark.parametrize("v", [v for device in DEVICES for v in variants(device)], ids=str)
def test_compiles_without_spills(v: Variant) -> None:
    compiled = build(v)
    assert compiled.stack == 0
    assert compiled.local == 0
    assert not {"LDL", "STL"} & set(compiled.opcodes)
    assert compiled.shared <= v.device.shared_bytes
    capability = v.device.capability
    products = (INTEGER if v.x == "i8" else FLOAT8)[capability]
    assert compiled.opcodes[products] > 0
    if capability == 100:  # Its loop nests others, which `main_loop` does not tell apart.
        return
    loop = compiled.main_loop
    assert loop[products] > 0
    assert loop["LDGSTS"] > 0
    assert loop["LDG"] == 0, "a load in the loop is not asynchronous"
    assert loop["STS"] == 0, "codes pass through registers"
    if capability == 90:
        assert loop["WARPGROUP"] <= 2, "ptxas serialises wgmma (C7515)"
        if v.tile.block_m == 16:
            threads, weights = 32 * v.tile.warps, v.tile.block_n * v.tile.block_k
            assert loop.total() * threads / weights <= SMALL_INSTRUCTIONS
