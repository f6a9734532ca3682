"""Compile the kernels of the 4-bit cache as `kv_int4.triton` launches them, for any GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from quantkit_kernels.kv_int4 import triton_merge, triton_prefill, triton_rotate, triton_write
from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.triton_decode import attend_split
from quantkit_kernels.kv_int4.triton_launch import groups_of, head_of
from quantkit_kernels.kv_int4.triton_tiles import (
    DecodeTile,
    PrefillTile,
    decode_tile,
    key_piece,
    prefill_tile,
    row_warps,
    value_piece,
)
from quantkit_kernels.tuning import Device
from tests.kernels.aot import DEVICES, Compiled, compile_kernel
from tests.kernels.gates import Gate

AMPERE, ADA, HOPPER, BLACKWELL = DEVICES

HEADLINE = ((128, 1), (128, 4), (128, 8))
"""Head sizes and query heads of a group that most models have."""

DECODED = (
    *HEADLINE,
    (128, 16),
    (64, 4),
    (64, 16),
    (96, 4),
    (96, 16),
    (192, 4),
    (192, 16),
    (256, 4),
)
"""What decoding is compiled for on Hopper; 16 heads of size 256 run the last one twice."""

DECODED_ELSEWHERE = ((96, 4), (128, 4), (128, 16), (256, 4))
"""The same for the other generations: each cut once."""

SURROUNDED = {AMPERE: 128, ADA: 80, HOPPER: 256, BLACKWELL: 64}
"""Head sizes for which all the small kernels are compiled."""

PREFILLED = (
    (AMPERE, 128, 4096),
    (ADA, 64, 4096),
    (HOPPER, 128, 16),
    (HOPPER, 128, 4096),
    (HOPPER, 256, 4096),
    (BLACKWELL, 128, 4096),
)
"""GPUs, head sizes and query rows of a request."""

SPILLS = {
    "write 128 sm_80": 8,
    "prefill 128 rows 4096 bf16 sm_80": 80,
    "prefill 128 rows 4096 bf16 sm_90": 8,
    "prefill 256 rows 4096 bf16 sm_90": 392,
}
"""Bytes of stack, none of it used in the main loop, of the compiler that needs more.

Prefilling rotates its sums once, two tiles into two others, which together fill the registers.
"""

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
UNALIGNED = ("tokens", "splits", "rows", "start", "stop", "table_stride")
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
        "VALUE_PIECE": value_piece(layout, tile.warps),
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


def layout_of(head_size: int) -> CacheLayout:
    """In blocks of 128 tokens."""
    return CacheLayout(head_size, 128, value_columns=True)


def decode_name(size: int, group: int, device: Device) -> str:
    """A gate's."""
    return f"decode {size} group {group} bf16 sm_{device.capability}"


def _decode_gate(size: int, group: int, device: Device) -> Gate:
    layout = layout_of(size)
    tile = decode_tile(group, layout, device, exact=False)
    return Gate(
        decode_name(size, group, device),
        device,
        partial(decode, layout, group, tile, "bf16", device.capability),
        per_value=partial(lane_ops, layout=layout, tile=tile),
        products="HMMA",
        loads=tile.tokens * layout.padded_size // (16 * 32 * tile.warps),
        # Two warps exchange maxima through shared memory, and so does Triton 3.6 short pieces.
        direct=tile.warps == 1 and size % 64 == 0,
    )


def _drafts_gate(device: Device) -> Gate:
    """Several queries a request, and all that is done to logits."""
    layout = layout_of(128)
    tile = decode_tile(16, layout, device, exact=False)
    options = {"many": True, "window": 99, "capped": True}
    run = partial(decode, layout, 4, tile, "fp16", device.capability, **options)
    name = f"decode 128 drafts fp16 sm_{device.capability}"
    return Gate(name, device, run, products="HMMA")


def _around(device: Device, size: int) -> Iterator[Gate]:
    layout, arch = layout_of(size), device.capability
    kernels: dict[str, Callable[[], Compiled]] = {
        "write": partial(writing, layout, "bf16", arch, treated=True),
        "rotate": partial(rotation, layout, 8, "fp16", arch),
        "merge": partial(merge, layout, 8, "bf16", arch),
        "gather": partial(gathering, layout, "bf16", arch),
    }
    for name, run in kernels.items():
        full_name = f"{name} {size} sm_{arch}"
        yield Gate(full_name, device, run, spill=SPILLS.get(full_name, 0))


def _prefill_gate(device: Device, size: int, rows: int) -> Gate:
    layout = layout_of(size)
    tile = prefill_tile(rows, layout, device, exact=False)
    arch = device.capability
    run = partial(prefilling, layout, 4, tile, "bf16", arch)
    name = f"prefill {size} rows {rows} bf16 sm_{arch}"
    return Gate(name, device, run, spill=SPILLS.get(name, 0))


def gates() -> list[Gate]:
    """All kernels of the cache, as the GPUs of each generation run them."""
    found = [_decode_gate(size, group, HOPPER) for size, group in DECODED]
    for device in (AMPERE, ADA, BLACKWELL):
        found += [_decode_gate(size, group, device) for size, group in DECODED_ELSEWHERE]
    found += [_drafts_gate(device) for device in DEVICES]
    for device, size in SURROUNDED.items():
        found += _around(device, size)
    return found + [_prefill_gate(*case) for case in PREFILLED]
