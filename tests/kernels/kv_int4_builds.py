"""Compile the kernels of the 4-bit cache as `kv_int4.triton` launches them, for any GPU."""

from __future__ import annotations

from quantkit_kernels.kv_int4 import triton_merge, triton_prefill, triton_rotate, triton_write
from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.triton_decode import attend_split
from quantkit_kernels.kv_int4.triton_launch import groups_of, head_of
from quantkit_kernels.kv_int4.triton_tiles import (
    DecodeTile,
    PrefillTile,
    key_piece,
    row_warps,
    value_piece,
)
from tests.kernels.aot import Compiled, compile_kernel

POINTERS = {
    "cache_ptr": "*u8",
    "table_ptr": "*i32",
    "blocks_ptr": "*i32",
    "lengths_ptr": "*i32",
    "starts_ptr": "*i32",
    "slots_ptr": "*i64",
    "lse_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "shift_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "sinks_ptr": "*fp32",
    "products_ptr": "*fp32",
    "signs_ptr": "*bf16",
}
"""What every kernel's pointers of a name point at; others point at activations."""

FLOATS = ("softcap", "factor", "root")
UNALIGNED = ("tokens", "splits", "rows", "start", "stop")
"""Integers that are not specialised."""


def build(
    kernel: object,
    constants: dict[str, object],
    dtype: str,
    arch: int,
    warps: int = 4,
    **types: str,
) -> Compiled:
    """Compile for capability arch / 10, activations being `dtype`.

    Args:
        constants: constexpr arguments, and pointers that are None.
        types: of pointers whose type is neither that of `POINTERS` nor `dtype`.
    """
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    numbers = [name for name in kernel.arg_names if name.islower() and name not in pointers]
    signature = {name: types.get(name, POINTERS.get(name, f"*{dtype}")) for name in pointers}
    signature |= {name: "fp32" if name in FLOATS else "i32" for name in numbers}
    plain = {*FLOATS, *UNALIGNED, *constants}
    aligned = tuple(name for name in (*pointers, *numbers) if name not in plain)
    return compile_kernel(kernel, signature, constants, aligned, arch, warps)


def nothing(*names: str) -> dict[str, object]:
    """Pointers that are None."""
    return dict.fromkeys(names)


def decode(
    layout: CacheLayout,
    group: int,
    tile: DecodeTile,
    dtype: str,
    arch: int,
    *,
    many: bool = False,
    window: int = 0,
    capped: bool = False,
) -> Compiled:
    """`attend_split` for groups of so many query heads; `many` queries a request."""
    constants = groups_of(layout) | {
        "G": group,
        "HALF": layout.half,
        "KEY_PIECE": key_piece(layout),
        "VALUE_PIECE": value_piece(layout),
        "N": tile.tokens,
        "R": tile.rows,
        "MANY": many,
        "WINDOW": window,
        "CAPPED": capped,
        "STAGES": tile.stages,
        "ASM": True,
    }
    constants |= {} if capped else nothing("shift_ptr")
    return build(attend_split, constants, dtype, arch, tile.warps, out_ptr="*fp32")


def merge(layout: CacheLayout, group: int, dtype: str, arch: int) -> Compiled:
    """`merge_splits` with sinks."""
    constants = head_of(layout) | {"G": group, "WINDOW": 0, "N": 64, "R": 16, "ASM": True}
    return build(triton_merge.merge_splits, constants, dtype, arch, row_warps(layout))


def rotation(layout: CacheLayout, group: int, dtype: str, arch: int) -> Compiled:
    """`rotate_queries` with a treatment."""
    constants = head_of(layout) | {"G": group, "M": 16, "ASM": True}
    return build(triton_rotate.rotate_queries, constants, dtype, arch, row_warps(layout))


def writing(layout: CacheLayout, dtype: str, arch: int, *, treated: bool) -> Compiled:
    """`write_heads`."""
    constants = head_of(layout) | groups_of(layout) | {"M": 16, "ASM": True}
    constants |= {} if treated else nothing("shift_ptr", "scale_ptr")
    return build(triton_write.write_heads, constants, dtype, arch, row_warps(layout))


def gathering(layout: CacheLayout, dtype: str, arch: int) -> Compiled:
    """`gather_heads`."""
    constants = groups_of(layout) | {"HALF": layout.half, "M": 16}
    return build(triton_write.gather_heads, constants, dtype, arch)


def prefilling(
    layout: CacheLayout,
    group: int,
    tile: PrefillTile,
    dtype: str,
    arch: int,
    *,
    treated: bool = True,
    window: int = 0,
    raw: bool = True,
) -> Compiled:
    """`prefill_rows`."""
    constants = (
        head_of(layout)
        | groups_of(layout)
        | {
            "G": group,
            "N": tile.tokens,
            "M": tile.rows,
            "WINDOW": window,
            "CAPPED": False,
            "RAW": raw,
            "STAGES": tile.stages,
            "ASM": True,
        }
    )
    constants |= nothing("sinks_ptr")
    constants |= {} if treated else nothing("shift_ptr", "scale_ptr")
    return build(triton_prefill.prefill_rows, constants, dtype, arch, tile.warps)


def lane_ops(compiled: Compiled, layout: CacheLayout, tile: DecodeTile) -> float:
    """Instructions of the main loop, per lane, for each key or value that one step reads."""
    return compiled.main_loop.total() * tile.warps * 32 / (tile.tokens * 2 * layout.padded_size)
