"""How products of 8-bit codes are cut: pure functions of the shape and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit_kernels.tuning import (
    TILE_K,
    Device,
    allowed_splits,
    wanted_splits,
    whole_splits,
)

PERSISTENT_CAPABILITIES = range(90, 110)
"""Hopper and the Blackwell of data centres: TMA, and memory for several wide tiles."""

PERSISTENT_TOKENS = 64
"""With more, results are written a wide tile at a time; with fewer, weights are what is read."""

WIDE, NARROW = 256, 128
"""Channels of a persistent tile: as many as registers hold, or half where steps have scales."""

NARROW_COST = 0.6
"""Time of a narrow tile over that of a wide one: it reads x for half as many products."""


@dataclass(frozen=True)
class ScaledTile:
    """How a product of 8-bit codes is cut.

    Attributes:
        block_m: tokens per program.
        block_n: output channels per program.
        block_k: columns per step.
        warps: per program.
        stages: depth of the load pipeline.
        splits: as in `TileConfig`.
        swap: compute y^T = W x^T.
        persistent: one program per multiprocessor takes tile after tile, through TMA; without
            splits and swap.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int
    swap: bool
    persistent: bool = False


def select_scaled_tile(
    m: int,
    n: int,
    k: int,
    block_k: int,
    grouped: bool,
    device: Device,
    *,
    persistent: bool = True,
) -> ScaledTile:
    """The tile for y[m, n] with 8-bit weights in [n, k] and 8-bit rows.

    Args:
        m: tokens, at least 1.
        n: output channels.
        k: input channels.
        block_k: 32, 64 or 128.
        grouped: each step has scales.
        device: the GPU.
        persistent: whether the kernel can be.
    """
    if persistent and m > PERSISTENT_TOKENS and block_k == TILE_K:
        block_n = _persistent_width(m, n, grouped, device)
        if block_n:
            return _persistent_tile(block_n, grouped, device)
    block_m = next((size for size in (16, 32, 64) if m <= size), 128)
    for block_n in (128, 64) if block_m == 16 else (128,):
        programs = -(-n // block_n) * -(-m // block_m)
        wanted = wanted_splits(programs, block_m, device)
        allowed = allowed_splits(m, k, 8)
        if wanted <= allowed:
            break
    step_bytes = (block_m + block_n) * (block_k + 4 * grouped)
    return ScaledTile(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        warps=_warps(block_m, grouped, device),
        stages=_scaled_stages(block_m, step_bytes, device),
        splits=whole_splits(min(wanted, allowed), -(-k // block_k)),
        swap=_swaps(block_m, device),
    )


def persistent_refusal(tile: ScaledTile, device: Device) -> str:
    """Why a persistent tile cannot cut a product of 8-bit codes, in words; empty where it can."""
    if device.capability not in PERSISTENT_CAPABILITIES:
        return "persistent is true, which takes a GPU of capability 9.0 to 10.x"
    if tile.swap or tile.splits > 1:
        return "persistent is true, which goes with neither swap nor splits"
    return ""


def _warps(block_m: int, grouped: bool, device: Device) -> int:
    """Few for few tokens. On Blackwell 4 would spill with 64, where steps have scales."""
    return 8 if block_m > 64 or (block_m == 64 and grouped and device.capability >= 100) else 4


def _swaps(block_m: int, device: Device) -> bool:
    """64 tokens fill the tensor cores either way, but Blackwell's kernels spill without."""
    return block_m < 64 or (block_m == 64 and device.capability >= 100)


def _persistent_width(m: int, n: int, grouped: bool, device: Device) -> int:
    """Channels of a persistent tile; 0 where there are too few tiles to occupy the GPU."""
    if device.capability not in PERSISTENT_CAPABILITIES:
        return 0
    rows = -(-m // 128)
    narrow = rows * -(-n // NARROW)
    if 2 * narrow <= device.multiprocessors:
        return 0
    waves = {width: -(-rows * -(-n // width) // device.multiprocessors) for width in (WIDE, NARROW)}
    return NARROW if grouped or NARROW_COST * waves[NARROW] < waves[WIDE] else WIDE


def _persistent_tile(block_n: int, grouped: bool, device: Device) -> ScaledTile:
    # What is kept for storing, 64 channels of float32, shares the memory with the stages.
    room = device.shared_bytes - 128 * 64 * 4
    step_bytes = (128 + block_n) * (TILE_K + 4 * grouped)
    return ScaledTile(
        block_m=128,
        block_n=block_n,
        block_k=TILE_K,
        warps=8,
        stages=min(5, room // step_bytes),
        splits=1,
        swap=False,
        persistent=True,
    )


def _scaled_stages(block_m: int, step_bytes: int, device: Device) -> int:
    """As deep as pays and fits; before Hopper, one buffer fewer is kept than there are stages."""
    programs = 2 if block_m <= 32 else 1
    fitting = device.shared_bytes // programs // step_bytes + (device.capability < 90)
    return max(2, min(5 if block_m == 16 else 4, fitting))
