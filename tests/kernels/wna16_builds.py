"""Compile the weight-only kernels as `wna16.triton` launches them, for any GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from quantkit_kernels.code_types import CODE_BOOKS, CodeType
from quantkit_kernels.triton_common import SUM_BLOCK, sum_splits
from quantkit_kernels.tuning import TILE_K, Device
from quantkit_kernels.wna16 import triton_kernels
from quantkit_kernels.wna16.triton import DENSE_ROWS, DENSE_WARPS, takes_quads
from quantkit_kernels.wna16.triton_dequantise import WHOLE_ROW
from quantkit_kernels.wna16.triton_tiles import TileConfig, select_tile
from quantkit_kernels.wna16.weights import CONTAINER_OF
from tests.kernels.aot import DEVICES, Compiled, compile_kernel
from tests.kernels.gates import Gate
from tests.kernels.sass import longest_loop

AMPERE, ADA, HOPPER, BLACKWELL = DEVICES
TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = WHOLE_ROW.value

SHAPES = {(16, 64): (1, 1024, 2048), (16, 128): (1, 28672, 8192)}
"""Block to a shape (m, n, columns) that `select_tile` cuts so; others are as many tokens."""


@dataclass(frozen=True)
class Variant:
    """A product with weights dequantised in registers, as some GPU will run it.

    Attributes:
        block: block_m, block_n.
        group: group size, or ROWS.
        zero: the zero-point of all groups, or None.
    """

    device: Device
    block: tuple[int, int]
    bits: int
    group: int
    dtype: str = "bf16"
    zero: int | None = None
    code: CodeType = "int"
    splits: int = 1

    def __str__(self) -> str:
        name = f"w{self.bits}" if self.code == "int" else self.code
        group = f"g{self.group}" if self.group else "rows"
        marks = f"{' symmetric' * (self.zero is not None)}{' split' * (self.splits > 1)}"
        block = f"{self.block[0]}x{self.block[1]}"
        return f"{name} {group}{marks} {block} {self.dtype} sm_{self.device.capability}"

    @property
    def tile(self) -> TileConfig:
        """What `select_tile` makes of a shape that gives this block."""
        m, n, columns = SHAPES.get(self.block, (self.block[0], 28672, 8192))
        book, group = self.code in CODE_BOOKS, self.group or columns
        tile = select_tile(m, n, columns, self.bits, group, self.device, code_book=book)
        assert (tile.block_m, tile.block_n) == self.block
        return replace(tile, splits=self.splits)


def build(variant: Variant, tile: TileConfig | None = None) -> Compiled:
    """Compile `wna16_gemm` as `triton.run_tiled` launches it; another `tile` if one is given."""
    tile = tile or variant.tile
    split = tile.splits > 1
    constants = {
        "BITS": variant.bits,
        "CODE": variant.code,
        "G": variant.group,
        "ZERO": variant.zero,
        "QUADS": takes_quads(variant.device),
        "BM": tile.block_m,
        "BN": tile.block_n,
        "SCALE": tile.scale_weights,
        "STAGES": tile.stages,
        "ASM": True,
        "residual_ptr": None,
    } | ({"bias_ptr": None} if split else {})
    pointers = ("x_ptr", "codes_ptr", "scales_ptr", "bias_ptr", "out_ptr")
    element = f"*{variant.dtype}"
    out = "*fp32" if split else element
    return compile_kernel(
        triton_kernels.wna16_gemm,
        types=dict.fromkeys(("M", "N", "k_tiles", "split_tiles"), "i32")
        | dict(zip(pointers, (element, "*i32", "*i32", element, out), strict=True)),
        constants=constants,
        aligned=tuple(name for name in (*pointers, "N") if name not in constants),
        arch=variant.device.capability,
        warps=tile.warps,
    )


def per_weight(compiled: Compiled, variant: Variant) -> float:
    """Instructions of the main loop, per lane, for each weight that one step multiplies."""
    weights = variant.block[1] * TILE_K
    return compiled.main_loop.total() * variant.tile.warps * 32 / weights


def full_waits(compiled: Compiled) -> int:
    """How often a step waits until no product is in flight: once to read sums, else ptxas has
    made every product wait (its advice C7515)."""
    return sum(
        text.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0") for text in longest_loop(compiled.sass)
    )


def gate(variant: Variant) -> Gate:
    """Operands are direct, but for sm_100, where from 64 tokens on scales are not loaded so."""
    capability, (block_m, block_n) = variant.device.capability, variant.block
    staged = capability >= 100 and block_m >= 64
    loaded = block_n * TILE_K * variant.bits // 8 + block_m * TILE_K * 2
    return Gate(
        name=str(variant),
        device=variant.device,
        build=partial(build, variant),
        per_value=partial(per_weight, variant=variant),
        products=TENSOR_CORES[capability],
        loads=loaded // (16 * 32 * variant.tile.warps),
        direct=not staged,
    )


def hopper_variants() -> list[Variant]:
    """Every tile, width, group, kind of zero-point and code, each with the others that it may meet
    in turn."""
    int4 = [
        (128, (16, 64)),
        (128, (16, 128)),
        (128, (32, 128)),
        (128, (64, 128)),
        (128, (128, 128)),
    ]
    int4 += [(128, (256, 128)), (32, (16, 128)), (32, (64, 128)), (32, (256, 128))]
    halves = [(16, (16, 64)), (64, (16, 128)), (64, (128, 128))]
    int8 = [(ROWS, (16, 64)), (ROWS, (16, 128)), (128, (16, 128)), (ROWS, (64, 128))]
    int8 += [(ROWS, (256, 128))]
    int2 = [(128, (16, 128)), (64, (16, 128)), (32, (128, 128))]
    codes: list[tuple[CodeType, int, tuple[int, int], str]] = [
        ("e4m3", 128, (16, 128), "bf16"),
        ("e4m3", 64, (128, 128), "bf16"),
        ("nf4", 128, (16, 128), "fp16"),
        ("nf4", 64, (256, 128), "fp16"),
        ("fp4", 128, (16, 128), "bf16"),
    ]
    return [
        *(Variant(HOPPER, block, 4, group) for group, block in int4),
        *(Variant(HOPPER, block, 4, group, "fp16") for group, block in halves),
        Variant(HOPPER, (16, 128), 4, 128, zero=8),
        Variant(HOPPER, (16, 128), 4, 128, splits=2),
        *(Variant(HOPPER, block, 8, group, zero=128) for group, block in int8),
        Variant(HOPPER, (16, 128), 8, 128, "fp16"),
        Variant(HOPPER, (128, 128), 8, 32),
        *(Variant(HOPPER, block, 2, group) for group, block in int2),
        Variant(HOPPER, (16, 64), 2, 16, "fp16"),
        *(
            Variant(HOPPER, block, CONTAINER_OF[code], group, dtype, code=code)
            for code, group, block, dtype in codes
        ),
    ]


def other_variants() -> list[Variant]:
    """The same with fewer, for the GPUs that have other tensor cores."""
    return [
        Variant(AMPERE, (16, 128), 4, 128),
        Variant(AMPERE, (128, 128), 4, 32),
        Variant(AMPERE, (16, 128), 8, ROWS, zero=128),
        Variant(AMPERE, (64, 128), 2, 64, "fp16"),
        Variant(AMPERE, (64, 128), 4, 64, "fp16", code="nf4"),
        Variant(ADA, (64, 128), 4, 128, "fp16"),
        Variant(ADA, (128, 128), 8, 32),
        Variant(BLACKWELL, (16, 128), 4, 128),
        Variant(BLACKWELL, (128, 128), 4, 32),
        Variant(BLACKWELL, (64, 128), 8, ROWS, zero=128),
        Variant(BLACKWELL, (16, 128), 2, 64, "fp16"),
        Variant(BLACKWELL, (128, 128), 4, 64, "fp16", code="nf4"),
    ]


VARIANTS = {str(variant): variant for variant in (*hopper_variants(), *other_variants())}


def build_rows(device: Device, bits: int, group: int, dtype: str, code: CodeType) -> Compiled:
    """Compile `dequantise_rows` as `triton.run_dense` launches it."""
    return compile_kernel(
        triton_kernels.dequantise_rows,
        types=dict.fromkeys(("N", "first_row", "k_tiles"), "i32")
        | {"codes_ptr": "*i32", "scales_ptr": "*i32", "out_ptr": f"*{dtype}"},
        constants={
            "BITS": bits,
            "CODE": code,
            "G": group,
            "ZERO": None,
            "QUADS": takes_quads(device),
            "ROWS": DENSE_ROWS[DTYPES[dtype]],
            "ASM": True,
        },
        aligned=("codes_ptr", "scales_ptr", "out_ptr", "N"),
        arch=device.capability,
        warps=DENSE_WARPS,
    )


def per_row_weight(compiled: Compiled, dtype: str) -> float:
    """Instructions of the whole of `dequantise_rows`, per lane, for each weight."""
    weights = DENSE_ROWS[DTYPES[dtype]] * TILE_K
    return compiled.opcodes.total() * DENSE_WARPS * 32 / weights


def build_sums(device: Device, dtype: str) -> Compiled:
    """Compile `sum_splits` as `add_splits` launches it."""
    pointers = ("partial_ptr", "bias_ptr", "residual_ptr", "out_ptr")
    element = f"*{dtype}"
    return compile_kernel(
        sum_splits,
        types=dict.fromkeys(("M", "N", "splits"), "i32")
        | dict(zip(pointers, ("*fp32", element, element, element), strict=True)),
        constants={"BLOCK": SUM_BLOCK},
        aligned=(*pointers, "N"),
        arch=device.capability,
        warps=4,
    )


def gates() -> list[Gate]:
    """All kernels of this family."""
    rows: list[tuple[Device, int, int, str, CodeType]] = [
        (HOPPER, 4, 128, "bf16", "int"),
        (HOPPER, 8, ROWS, "fp16", "int"),
        (AMPERE, 4, 32, "fp32", "nf4"),
        (BLACKWELL, 2, 64, "bf16", "int"),
    ]
    return [
        *(gate(variant) for variant in VARIANTS.values()),
        *(
            Gate(
                f"dequantised {code if code != 'int' else f'w{bits}'} "
                f"{f'g{group}' if group else 'rows'} {dtype} sm_{device.capability}",
                device,
                partial(build_rows, device, bits, group, dtype, code),
                partial(per_row_weight, dtype=dtype),
            )
            for device, bits, group, dtype, code in rows
        ),
        *(
            Gate(
                f"sums of splits {dtype} sm_{device.capability}",
                device,
                partial(build_sums, device, dtype),
            )
            for device, dtype in ((AMPERE, "fp32"), (HOPPER, "bf16"))
        ),
    ]
