"""Compile the kernels of LLM.int8 as `llm_int8.triton` launches them, for any GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

from quantkit_kernels.llm_int8 import triton as backend
from quantkit_kernels.llm_int8.triton_kernels import flag_outliers, llm_int8_gemm, quantise_rest
from quantkit_kernels.scaled_mm.triton_tiles import ScaledTile, select_scaled_tile
from quantkit_kernels.tuning import TILE_K, Device
from tests.kernels.aot import DEVICES, Compiled, compile_kernel
from tests.kernels.gates import Gate
from tests.kernels.sass import loops, opcode
from tests.kernels.scaled_mm_builds import INTEGER

N = K = 8192
"""A large layer."""

HALF = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""GPU to the tensor cores' instruction for outliers."""


@dataclass(frozen=True)
class Variant:
    """One product as some GPU runs it.

    Attributes:
        device: the GPU.
        tile: how the product is cut.
        dtype: Triton's name of that of x.
    """

    device: Device
    tile: ScaledTile
    dtype: str

    def __str__(self) -> str:
        tile, split = self.tile, " split" * (self.tile.splits > 1)
        cut = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
        return f"llm.int8 {cut} {self.dtype}{split} sm_{self.device.capability}"


@cache
def product(v: Variant) -> Compiled:
    """`llm_int8_gemm`."""
    split = v.tile.splits > 1
    constants = dict.fromkeys(("bias_ptr", "residual_ptr") if split else ()) | {
        "SCALES_AT": K // 4,
        "RAGGED": False,
        "SWAP": v.tile.swap,
        "BM": v.tile.block_m,
        "BN": v.tile.block_n,
        "BK": v.tile.block_k,
        "STAGES": v.tile.stages,
        "ASM": True,
    }
    types = {
        "rows_ptr": "*i8",
        "row_scales_ptr": "*fp32",
        "x_ptr": f"*{v.dtype}",
        "codes_ptr": "*i8",
        "w_scales_ptr": "*fp32",
        "outliers_ptr": "*i32",
        "count_ptr": "*i32",
        "bias_ptr": f"*{v.dtype}",
        "residual_ptr": f"*{v.dtype}",
        "out_ptr": "*fp32" if split else f"*{v.dtype}",
        **dict.fromkeys(("N", "K", "row_stride", "w_stride"), "i32"),
    }
    return compile_kernel(
        llm_int8_gemm,
        types=types | dict.fromkeys(("M", "k_steps", "split_steps"), "i32"),
        constants=constants,
        aligned=tuple(name for name in types if name not in constants),
        arch=v.device.capability,
        warps=v.tile.warps,
    )


def search(device: Device) -> Compiled:
    """`flag_outliers`."""
    return compile_kernel(
        flag_outliers,
        types={"x_ptr": "*bf16", "flags_ptr": "*i32", "M": "i32", "K": "i32", "threshold": "fp32"},
        constants={"BM": backend.FLAG_TOKENS, "BK": backend.FLAG_COLUMNS},
        aligned=("x_ptr", "flags_ptr", "K"),
        arch=device.capability,
        warps=4,
    )


def quantising(device: Device) -> Compiled:
    """`quantise_rest`."""
    pointers = {
        "x_ptr": "*bf16",
        "flags_ptr": "*i32",
        "rows_ptr": "*u8",
        "words_ptr": "*fp32",
        "outliers_ptr": "*i32",
        "count_ptr": "*i32",
    }
    return compile_kernel(
        quantise_rest,
        types=pointers | {"K": "i32", "row_stride": "i32"},
        constants={"BLOCK": backend.QUANTISE_BLOCK},
        aligned=(*pointers, "K", "row_stride"),
        arch=device.capability,
        warps=backend.QUANTISE_WARPS,
    )


def products() -> Iterator[Variant]:
    """Few tokens, some and many, everywhere."""
    for device in DEVICES:
        for m, dtype in ((16, "bf16"), (64, "fp16"), (4096, "bf16")):
            tile = select_scaled_tile(m, N, K, TILE_K, False, device, persistent=False)
            yield Variant(device, tile, dtype)


def per_weight(v: Variant, compiled: Compiled) -> float:
    """Instructions of the loop over int8, per thread, for each weight that the thread handles."""
    loop = next(loop for loop in loops(compiled.sass) if _has(loop, INTEGER[v.device.capability]))
    return len(loop) * 32 * v.tile.warps / (v.tile.block_n * v.tile.block_k)


def _has(loop: list[str], wanted: str) -> bool:
    return any(opcode(text) == wanted for text in loop)


def gates() -> list[Gate]:
    """All that is compiled, and what it must pass."""
    # Blackwell's loops nest others, and are not counted.
    found = [
        Gate(
            name=str(v),
            device=v.device,
            build=partial(product, v),
            per_value=partial(per_weight, v) if v.device.capability < 100 else None,
        )
        for v in products()
    ]
    hopper = DEVICES[2]
    found.append(Gate("llm.int8 search sm_90", hopper, partial(search, hopper)))
    found += [
        Gate(f"llm.int8 rows sm_{device.capability}", device, partial(quantising, device))
        for device in (DEVICES[0], hopper)
    ]
    return found
