"""Compile the activation kernel as `act_quant.triton` launches it, for any GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from math import inf

from quantkit_kernels.act_quant import PER_TENSOR, RowQuantizer
from quantkit_kernels.act_quant.source import Kind
from quantkit_kernels.act_quant.triton import FLOAT8_CAPABILITY, cut
from quantkit_kernels.act_quant.triton_rows import quantise_row
from tests.kernels.aot import DEVICES, Compiled, compile_kernel
from tests.kernels.gates import Gate
from tests.kernels.sass import instructions

INT8, E4M3, BLOCKS = RowQuantizer("int8"), RowQuantizer("e4m3"), RowQuantizer("e4m3", 128)
ZEROS = RowQuantizer("int8", symmetric=False)

KINDS: tuple[Kind, ...] = ("x", "norm", "add_norm", "silu_mul")

WIDTHS = (2048, 5120, 8192, 11008, 14336, 28672)
"""Hidden and intermediate sizes of models, besides 4096."""

WIDEST_SPILL = 64
"""Bytes a thread of `WIDEST` may spill: Triton 3.9 loads further ahead than 128 registers allow."""

READS: dict[Kind, tuple[str, ...]] = {
    "x": (),
    "norm": ("weight_ptr",),
    "add_norm": ("weight_ptr", "residual_ptr", "total_ptr"),
    "silu_mul": (),
}
"""Kind to the tensors it needs besides x."""

TENSORS = ("weight_ptr", "residual_ptr", "total_ptr", "scale_ptr", "zero_ptr")
"""Arguments that may be None."""


@dataclass(frozen=True)
class Variant:
    """One kernel that some GPU will run.

    Attributes:
        dtype: Triton's name of that of x, residual and weight.
        static: the scale is given, and the zero-point where there is one.
    """

    kind: Kind
    quantizer: RowQuantizer
    width: int = 4096
    dtype: str = "bf16"
    static: bool = False

    def __str__(self) -> str:
        quantizer = self.quantizer
        marks = f" g{quantizer.group_size}" * (quantizer.group_size > 0)
        marks += " zeros" * (not quantizer.symmetric) + " static" * self.static
        marks += f" sums{quantizer.sum_group}" * (quantizer.sum_group > 0)
        return f"{self.kind} {quantizer.code}{marks} {self.width} {self.dtype}"

    @property
    def scalars(self) -> int:
        """Single numbers that it loads."""
        return int(self.static) * (2 - self.quantizer.symmetric)


WIDEST = Variant("add_norm", INT8, 28672, "fp32")
"""What needs most registers of all."""


@cache
def build(variant: Variant, arch: int) -> Compiled:
    """Compile `quantise_row` for capability arch / 10."""
    quantizer, width = variant.quantizer, variant.width
    parts = cut(quantizer, width)
    assert parts is not None
    given = {*READS[variant.kind]} | ({"scale_ptr"} if variant.static else set())
    given |= {"zero_ptr"} if variant.static and not quantizer.symmetric else set()
    constants = {name: None for name in TENSORS if name not in given} | {
        "KIND": variant.kind,
        "E4M3": quantizer.code == "e4m3",
        "SYMMETRIC": quantizer.symmetric,
        "BOUNDED": quantizer.upper_bound < inf,
        "CONVERT": arch >= FLOAT8_CAPABILITY,
        "ASM": True,
        "WIDTH": width,
        "GROUP": parts.group,
        "SUM_GROUP": parts.sum_group,
        "ROW": quantizer.layout(width).stride,
        "C": parts.chunk,
    }
    floats = ("x_ptr", "residual_ptr", "weight_ptr", "total_ptr")
    aligned = dict.fromkeys(floats, f"*{variant.dtype}")
    aligned |= {"rows_ptr": "*u8", "words_ptr": "*i32", "scale_ptr": "*fp32", "zero_ptr": "*fp32"}
    strides = {"x_stride": "i32", "residual_stride": "i32"}
    types = aligned | strides | {"epsilon": "fp32", "bound": "fp32"}
    aligned |= strides if width % 16 == 0 else {}
    return compile_kernel(
        quantise_row,
        types=types,
        constants=constants,
        aligned=tuple(name for name in aligned if name not in constants),
        arch=arch,
        warps=parts.warps,
    )


def steps(variant: Variant) -> int:
    """Times that a thread takes 16 channels."""
    parts = cut(variant.quantizer, variant.width)
    assert parts is not None
    return -(-variant.width // parts.chunk)


def per_channel(variant: Variant, compiled: Compiled) -> float:
    """Instructions of a thread for each channel of the row: those it has, and no padding."""
    parts = cut(variant.quantizer, variant.width)
    assert parts is not None
    return len(instructions(compiled.sass)) * 32 * parts.warps / variant.width


def variants() -> list[tuple[Variant, int]]:
    """Kernels, each with the capability that it is compiled for, times ten.

    All kinds at 4096 for Hopper; all kinds at every other size, whose dtypes, codes and GPUs take
    turns; and one of each special row.
    """
    hopper = [(Variant(kind, code), 90) for code in (INT8, BLOCKS) for kind in KINDS]
    turns = zip(cycle(("bf16", "fp16", "fp32")), cycle((INT8, INT8, BLOCKS, INT8, E4M3)))
    arches = cycle((80, 90, 89, 100, 100, 80, 90))
    sizes = [(kind, width) for width in WIDTHS for kind in KINDS]
    others = [
        (Variant(kind, INT8 if arch < FLOAT8_CAPABILITY else code, width, dtype), arch)
        for (kind, width), (dtype, code), arch in zip(sizes, turns, arches, strict=False)
    ]
    static, static_zero = RowQuantizer("e4m3", PER_TENSOR), RowQuantizer("int8", PER_TENSOR, False)
    special = [
        (Variant("norm", ZEROS), 90),
        (Variant("add_norm", RowQuantizer("int8", sum_group=128)), 90),
        (Variant("silu_mul", RowQuantizer("int8", symmetric=False, sum_group=32), 14336), 100),
        (Variant("norm", RowQuantizer("int8", sum_group=5120), 5120), 89),
        (Variant("x", static, 5120, static=True), 89),
        (Variant("x", static_zero, 11008, "fp16", static=True), 80),
        (WIDEST, 100),
    ]
    return hopper + others + special


def gates() -> list[Gate]:
    """What must hold of each."""
    devices = {device.capability: device for device in DEVICES}
    return [
        Gate(
            name=f"{variant} sm_{arch}",
            device=devices[arch],
            build=partial(build, variant, arch),
            per_value=partial(per_channel, variant),
            spill=WIDEST_SPILL if variant == WIDEST else 0,
        )
        for variant, arch in variants()
    ]
