"""Which tile a kernel uses: pure functions of the shape and the GPU, so nothing is tuned late."""

from __future__ import annotations

from dataclasses import dataclass

TILE_K = 128
"""Columns of one step along k, fixed by the weight layout."""

MIN_SPLIT_TILES = 4
"""A split shorter than this many k tiles spends its time filling the pipeline."""


@dataclass(frozen=True)
class Device:
    """What a tile choice depends on.

    Attributes:
        capability: 10 * major + minor of the compute capability.
        multiprocessors: how many there are.
        shared_bytes: shared memory that one program may use.
    """

    capability: int
    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class TileConfig:
    """How y^T = W x^T is cut.

    Attributes:
        block_m: tokens per program.
        block_n: output channels per program.
        warps: per program.
        stages: depth of the load pipeline.
        splits: programs that share one tile of y along k; their sums are added by a second kernel.
        scale_weights: round scaled weights to 16 bits; otherwise scale the fp32 result of each
            step, which needs groups of 128 and costs block_m * block_n registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    splits: int
    scale_weights: bool


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
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int
    swap: bool


def select_tile(
    m: int,
    n: int,
    columns: int,
    bits: int,
    group_size: int,
    device: Device,
    *,
    code_book: bool = False,
) -> TileConfig:
    """The tile for y[m, n] with weights of `bits` bits in [n, columns].

    Args:
        m: tokens, at least 1.
        n: output channels.
        columns: K'', a multiple of 128.
        bits: 4 or 8.
        group_size: 16, 32, 64 or 128.
        device: the GPU.
        code_book: codes are looked up, in tables that take registers.
    """
    crowded = code_book and device.capability < 90
    block_m = next((size for size in (16, 32, 64) if m <= size), 64 if crowded else 128)
    narrow = (128, 64) if block_m == 16 else (128,)
    for block_n in narrow:
        programs = -(-n // block_n) * -(-m // block_m)
        wanted = _wanted_splits(programs, block_m, device)
        allowed = _allowed_splits(m, columns, bits)
        if wanted <= allowed:
            break
    return TileConfig(
        block_m=block_m,
        block_n=block_n,
        warps=_warps(block_m, block_n, group_size, device, crowded),
        stages=_stages(block_m, block_n, bits, group_size, device),
        splits=_whole_splits(min(wanted, allowed), columns // TILE_K),
        scale_weights=block_m > 32 or group_size != TILE_K,
    )


def select_scaled_tile(
    m: int, n: int, k: int, block_k: int, grouped: bool, device: Device
) -> ScaledTile:
    """The tile for y[m, n] with 8-bit weights in [n, k] and 8-bit rows.

    Args:
        m: tokens, at least 1.
        n: output channels.
        k: input channels.
        block_k: 32, 64 or 128.
        grouped: each step has scales.
        device: the GPU.
    """
    block_m = next((size for size in (16, 32, 64) if m <= size), 128)
    for block_n in (128, 64) if block_m == 16 else (128,):
        programs = -(-n // block_n) * -(-m // block_m)
        wanted = _wanted_splits(programs, block_m, device)
        allowed = _allowed_splits(m, k, 8)
        if wanted <= allowed:
            break
    step_bytes = (block_m + block_n) * (block_k + 4 * grouped)
    return ScaledTile(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        warps=8 if block_m > 64 else 4,
        stages=_scaled_stages(block_m, step_bytes, device),
        splits=_whole_splits(min(wanted, allowed), -(-k // block_k)),
        swap=block_m <= 64,
    )


def _scaled_stages(block_m: int, step_bytes: int, device: Device) -> int:
    """As deep as pays and fits; before Hopper, one buffer fewer is kept than there are stages."""
    programs = 2 if block_m <= 32 else 1
    fitting = device.shared_bytes // programs // step_bytes + (device.capability < 90)
    return max(2, min(5 if block_m == 16 else 4, fitting))


def _wanted_splits(programs: int, block_m: int, device: Device) -> int:
    """Splits that fill the GPU in one wave: two small programs on a multiprocessor, or one big."""
    resident = 2 if block_m <= 64 else 1
    return max(1, resident * device.multiprocessors // programs)


def _allowed_splits(m: int, columns: int, bits: int) -> int:
    """Splits that stay long enough and whose fp32 sums weigh no more than the weights.

    splits * m * n * 4 bytes, written and read, against n * columns * bits / 8 bytes.
    """
    return max(1, min(columns // TILE_K // MIN_SPLIT_TILES, columns * bits // (64 * m)))


def _whole_splits(splits: int, k_tiles: int) -> int:
    """The splits that are left when each takes ceil(k tiles / splits) k tiles."""
    return -(-k_tiles // -(-k_tiles // splits))


def _warps(block_m: int, block_n: int, group_size: int, device: Device, crowded: bool) -> int:
    """8 warps to hold the sums of 128 tokens, or of 64 where registers are few; else 4.

    For sm_100, Triton 3.6 and 3.9 fail to compile as many scales per step as there are threads.
    """
    warps = 8 if block_m > (32 if crowded else 64) else 4
    scales = block_n * TILE_K // group_size
    if device.capability >= 100 and scales == warps * 32:
        return 12 - warps
    return warps


def _stages(block_m: int, block_n: int, bits: int, group_size: int, device: Device) -> int:
    """As deep as pays and fits.

    Triton 3.6 keeps as many buffers of W, x and scales as there are stages, and needs some room
    besides; 3.9 keeps one fewer, and one more of x. Up to 32 tokens two programs shall fit.
    """
    deepest = {16: 6 if block_n == 64 else 5, 32: 4, 64: 4, 128: 3}[block_m]
    x_bytes = block_m * TILE_K * 2
    step_bytes = x_bytes + block_n * (TILE_K * bits // 8 + TILE_K // group_size * 4)
    fitting = (device.shared_bytes - x_bytes) // step_bytes
    if block_m <= 32:
        fitting = min(fitting, 1 + (device.shared_bytes // 2 - x_bytes) // step_bytes)
    return max(2, min(deepest, fitting))
