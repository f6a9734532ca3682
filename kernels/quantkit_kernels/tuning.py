"""What the tile choices of all Triton kernels share: the GPU, and how many programs share k."""

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


def wanted_splits(programs: int, block_m: int, device: Device) -> int:
    """Splits that fill the GPU in one wave: two small programs on a multiprocessor, or one big."""
    resident = 2 if block_m <= 64 else 1
    return max(1, resident * device.multiprocessors // programs)


def allowed_splits(m: int, columns: int, bits: int) -> int:
    """Splits that stay long enough and whose fp32 sums weigh no more than the weights.

    splits * m * n * 4 bytes, written and read, against n * columns * bits / 8 bytes.
    """
    return max(1, min(columns // TILE_K // MIN_SPLIT_TILES, columns * bits // (64 * m)))


def whole_splits(splits: int, k_tiles: int) -> int:
    """The splits that are left when each takes ceil(k tiles / splits) k tiles."""
    return -(-k_tiles // -(-k_tiles // splits))
