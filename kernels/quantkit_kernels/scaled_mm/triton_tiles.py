"""How products of 8-bit codes are cut: pure functions of the shape and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit_kernels.tuning import Device, allowed_splits, wanted_splits, whole_splits


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
        wanted = wanted_splits(programs, block_m, device)
        allowed = allowed_splits(m, k, 8)
        if wanted <= allowed:
            break
    step_bytes = (block_m + block_n) * (block_k + 4 * grouped)
    return ScaledTile(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        warps=8 if block_m > 64 else 4,
        stages=_scaled_stages(block_m, step_bytes, device),
        splits=whole_splits(min(wanted, allowed), -(-k // block_k)),
        swap=block_m <= 64,
    )


def _scaled_stages(block_m: int, step_bytes: int, device: Device) -> int:
    """As deep as pays and fits; before Hopper, one buffer fewer is kept than there are stages."""
    programs = 2 if block_m <= 32 else 1
    fitting = device.shared_bytes // programs // step_bytes + (device.capability < 90)
    return max(2, min(5 if block_m == 16 else 4, fitting))
