"""Compile the kernels for 8-bit codes as `scaled_mm.triton_launch` launches them, for any GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

from quantkit_kernels.scaled_mm.triton_kernels import scaled_gemm
from quantkit_kernels.scaled_mm.triton_launch import W_BLOCK
from quantkit_kernels.scaled_mm.triton_persistent import persistent_gemm
from quantkit_kernels.scaled_mm.triton_tiles import ScaledTile, select_scaled_tile
from quantkit_kernels.tuning import Device
from tests.kernels.aot import DEVICES, Compiled, compile_kernel
from tests.kernels.gates import TRITON, Gate

N = K = 8192
"""A large layer."""

INTEGER = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA" if TRITON == "3.6" else "UTCIMMA"}
"""GPU to the tensor cores' instruction. Triton 3.6 knows none of Blackwell's for integers and takes
Ampere's there."""

FLOAT8 = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA"}

PARTS = {
    "x_scales_ptr": "*fp32",
    "w_scales_ptr": "*fp32",
    "sums_ptr": "*i32",
    "zeros_ptr": "*i32",
    "bias_ptr": "*bf16",
    "residual_ptr": "*bf16",
}
"""What both kernels' pointers point at, besides codes and results."""


@dataclass(frozen=True)
class Variant:
    """One kernel as some GPU runs it.

    Attributes:
        device: the GPU.
        tile: how the product is cut.
        w: Triton's name of a weight's codes; rows have int8 beside int8, else E4M3.
        groups: columns that share a scale, of rows and weight.
        blocks: 128 channels share the scales of groups.
        zeros: both sides have zero-points.
        ragged: K is a multiple of 16, but of no step.
    """

    device: Device
    tile: ScaledTile
    w: str
    groups: tuple[int, int] = (0, 0)
    blocks: bool = False
    zeros: bool = False
    ragged: bool = False

    @property
    def x(self) -> str:
        """Triton's name of a row's codes."""
        return "i8" if self.w == "i8" else "fp8e4nv"

    @property
    def persistent(self) -> bool:
        """The tile is, and the kernel with it: see `triton_launch.run_tiled`."""
        return self.tile.persistent and (self.groups[1] == 0 or self.blocks)

    @property
    def products(self) -> str:
        """The tensor cores' instruction."""
        return (INTEGER if self.w == "i8" else FLOAT8)[self.device.capability]

    def __str__(self) -> str:
        tile = self.tile
        kind = {"i8": "int8", "fp8e4nv": "e4m3", "fp8e5": "e5m2"}[self.w]
        groups = f" g{self.groups[0]}x{self.groups[1]}" if self.groups[1] else ""
        marks = " blocks" * self.blocks + " zeros" * self.zeros + " ragged" * self.ragged
        marks += " persistent" * self.persistent + " split" * (tile.splits > 1)
        cut = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
        return f"{kind}{groups} {cut}{marks} sm_{self.device.capability}"


@cache
def build(v: Variant) -> Compiled:
    """Compile what `triton_launch.run_tiled` launches."""
    absent = [] if v.zeros else ["sums_ptr", "zeros_ptr"]
    absent += ["bias_ptr", "residual_ptr"] if v.tile.splits > 1 else []
    constants = dict.fromkeys(absent) | {
        "X_GROUP": v.groups[0],
        "W_GROUP": v.groups[1],
        "W_BLOCK": W_BLOCK if v.blocks else 1,
        "SCALES_AT": K // 4,
        "BM": v.tile.block_m,
        "BN": v.tile.block_n,
        "BK": v.tile.block_k,
        "STAGES": v.tile.stages,
        "ASM": True,
    }
    types = PARTS | {"out_ptr": "*fp32" if v.tile.splits > 1 else "*bf16"}
    return (_persistent if v.persistent else _any_gpu)(v, constants, types)


def _any_gpu(v: Variant, constants: dict[str, object], types: dict[str, str]) -> Compiled:
    pointers = types | {"x_ptr": f"*{v.x}", "codes_ptr": f"*{v.w}"}
    sizes = ("M", "N", "K", "x_stride", "w_stride", "k_steps", "split_steps")
    aligned = (*pointers, "N", "K", "x_stride", "w_stride")
    constants = constants | {"RAGGED": v.ragged, "SWAP": v.tile.swap}
    return _compiled(v, scaled_gemm, pointers | dict.fromkeys(sizes, "i32"), constants, aligned)


def _persistent(v: Variant, constants: dict[str, object], types: dict[str, str]) -> Compiled:
    tile = v.tile
    blocks = {
        "x_codes": f"tensordesc<{v.x}[{tile.block_m}, {tile.block_k}]>",
        "w_codes": f"tensordesc<{v.w}[{tile.block_n}, {tile.block_k}]>",
    }
    sizes = dict.fromkeys(("M", "N", "x_words", "k_steps"), "i32")
    return _compiled(v, persistent_gemm, types | blocks | sizes, constants, (*types, "N"))


def _compiled(
    v: Variant,
    kernel: object,
    types: dict[str, str],
    constants: dict[str, object],
    aligned: tuple[str, ...],
) -> Compiled:
    given = tuple(name for name in aligned if name not in constants)
    return compile_kernel(kernel, types, constants, given, v.device.capability, v.tile.warps)


def variant(
    device: Device, m: int, w: str, groups: tuple[int, int] = (0, 0), n: int = N, **options: bool
) -> Variant:
    """The tile for m tokens."""
    block_k = next(size for size in (128, 64, 32) if all(g % size == 0 for g in groups))
    tile = select_scaled_tile(m, n, K, block_k, max(groups) > 0, device)
    return Variant(device, tile, w, groups, **options)


def variants(device: Device) -> Iterator[Variant]:
    """The extremes everywhere, and every tile and option on Hopper."""
    yield variant(device, 16, "i8")
    yield variant(device, 64, "i8", zeros=True)
    yield variant(device, 4096, "i8", zeros=True)
    if device.capability >= 89:
        yield variant(device, 16, "fp8e4nv")
        yield variant(device, 64, "fp8e4nv", (128, 128), blocks=True)
        yield variant(device, 4096, "fp8e4nv", (128, 128), blocks=True)
        yield variant(device, 64, "fp8e4nv", (128, 128))
        yield variant(device, 4096, "fp8e4nv", (128, 128))
        yield variant(device, 4096, "fp8e4nv")
    if device.capability == 90:
        yield variant(device, 32, "i8", ragged=True)
        yield variant(device, 16, "fp8e4nv", (128, 128), blocks=True)
        yield variant(device, 32, "fp8e4nv", (128, 128), blocks=True)
        yield variant(device, 64, "fp8e4nv")
        yield variant(device, 128, "fp8e4nv")
        yield variant(device, 16, "fp8e5", ragged=True)
        yield variant(device, 4096, "fp8e5", (0, 32), ragged=True)
        yield variant(device, 4096, "fp8e5")
        yield variant(device, 1024, "fp8e4nv", n=2048)


def per_weight(v: Variant, compiled: Compiled) -> float:
    """Instructions of the main loop, per thread, for each weight that the thread handles."""
    weights = v.tile.block_n * v.tile.block_k / (32 * v.tile.warps)
    return compiled.main_loop.total() / weights


def gate(v: Variant) -> Gate:
    """What a kernel must pass.

    The main loop is counted where it is one: not on Blackwell, where it nests others, nor in the
    persistent kernel, where it holds the storing of tiles as well.
    """
    plain = v.device.capability < 100 and not v.persistent
    loads = (v.tile.block_m + v.tile.block_n) * v.tile.block_k // (16 * 32 * v.tile.warps)
    return Gate(
        name=str(v),
        device=v.device,
        build=partial(build, v),
        per_value=partial(per_weight, v) if plain else None,
        products=v.products if plain or v.device.capability == 90 else None,
        loads=loads if plain else 0,
        direct=plain,
    )


def cases() -> list[Variant]:
    """All that is compiled."""
    return [v for device in DEVICES for v in variants(device)]


def gates() -> list[Gate]:
    """All that is compiled, and what it must pass."""
    return [gate(v) for v in cases()]
