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

DENSE_TOKENS = 1024
"""From this many tokens on, cuBLAS on dequantised weights should be faster."""


@dataclass(frozen=True)
class TileConfig:
    """How y^T = W x^T is cut.

    Attributes:
        block_m: tokens per program.
        block_n: output channels per program: 64 or 128.
        warps: per program.
        stages: depth of the load pipeline.
        splits: programs that share one tile of y along k; their sums are added by a second kernel.
        scale_weights: the sums stay in the tensor cores, so scaled weights are rounded to 16 bits,
            unless a row has one scale, which the sums get at the end. Otherwise the fp32 result of
            each step is scaled, which needs groups of 128 or whole rows and costs
            block_m * block_n registers.
        dense: W is dequantised to memory, some rows at a time, for cuBLAS; the rest is of no use.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    splits: int
    scale_weights: bool
    dense: bool = False


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
        bits: 2, 4 or 8.
        group_size: 16, 32, 64, 128, or `columns` of whole rows.
        device: the GPU.
        code_book: codes are looked up, in tables that take registers.
    """
    crowded = code_book and device.capability < 90
    block_m = _block_m(m, n, device, crowded)
    narrow = (128, 64) if block_m == 16 else (128,)
    for block_n in narrow:
        programs = -(-n // block_n) * -(-m // block_m)
        wanted = wanted_splits(programs, block_m, device)
        allowed = allowed_splits(m, columns, bits)
        if wanted <= allowed:
            break
    per_step = max(TILE_K // group_size, 1)
    return TileConfig(
        block_m=block_m,
        block_n=block_n,
        warps=_warps(block_m, block_n * per_step, device, crowded),
        stages=_stages(block_m, block_n, TILE_K * bits // 8 + per_step * 4, device),
        splits=whole_splits(min(wanted, allowed), columns // TILE_K),
        scale_weights=block_m > 32 or group_size < TILE_K,
        dense=m >= DENSE_TOKENS,
    )


def _block_m(m: int, n: int, device: Device, crowded: bool) -> int:
    """Tokens per program: the fewest that hold all, or as many as registers and the grid allow.

    With 256, weights are dequantised half as often, but Hopper alone has the registers: its tensor
    cores read x from shared memory and leave no copy of it.
    """
    largest = 64 if crowded else 128
    if device.capability == 90 and -(-n // 128) * -(-m // 256) >= device.multiprocessors:
        largest = 256
    return next((size for size in (16, 32, 64, 128) if m <= size <= largest), largest)


def _warps(block_m: int, scales: int, device: Device, crowded: bool) -> int:
    """8 warps to hold the sums of 128 tokens, or of 64 where registers are few; else 4.

    For sm_100, Triton 3.6 and 3.9 fail to compile as many scales per step as there are threads.
    """
    warps = 8 if block_m > (32 if crowded else 64) else 4
    if device.capability >= 100 and scales == warps * 32:
        return 12 - warps
    return warps


def _stages(block_m: int, block_n: int, row_bytes: int, device: Device) -> int:
    """As deep as pays and fits.

    Triton keeps a buffer fewer than there are stages of W and scales, and of x as many as stages;
    3.6 for mma.sync keeps as many of all. Up to 32 tokens two programs shall fit.
    """
    deepest = {16: 6 if block_n == 64 else 5, 32: 4, 64: 4, 128: 3, 256: 3}[block_m]
    x_bytes = block_m * TILE_K * 2
    step_bytes = x_bytes + block_n * row_bytes
    programs = 2 if block_m <= 32 else 1
    fitting = (device.shared_bytes // programs - x_bytes) // step_bytes
    whole = device.capability < 90 and programs == 1
    return max(2, min(deepest, fitting + (0 if whole else 1)))
