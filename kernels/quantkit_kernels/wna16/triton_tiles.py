"""How the kernels of 16-bit activations are cut: pure functions of the shape and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit_kernels.tuning import (
    TILE_K,
    Device,
    allowed_splits,
    wanted_splits,
    whole_splits,
)


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
        wanted = wanted_splits(programs, block_m, device)
        allowed = allowed_splits(m, columns, bits)
        if wanted <= allowed:
            break
    return TileConfig(
        block_m=block_m,
        block_n=block_n,
        warps=_warps(block_m, block_n, group_size, device, crowded),
        stages=_stages(block_m, block_n, bits, group_size, device),
        splits=whole_splits(min(wanted, allowed), columns // TILE_K),
        scale_weights=block_m > 32 or group_size != TILE_K,
    )


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
