"""How the Triton kernels of the cache are cut: pure functions of shapes the host knows."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.tuning import Device, batch_invariant

TILE = 64
"""A block holds a multiple of so many tokens."""

WARPS = 12
"""Warps that decode on each multiprocessor: what its registers hold."""

MOST_SPLITS = 128

INVARIANT_SPLITS = 8
"""Splits of every request where batches are invariant, each a fraction of its own positions.

More would fill a GPU with fewer requests, and take more memory for what they sum with many.
"""


PREFILL_ROWS = 128
"""Query rows of a program at most."""


@dataclass(frozen=True)
class DecodeTile:
    """How decoding is cut.

    Attributes:
        rows: query rows of a program.
        tokens: positions of a step.
        warps: per program.
        stages: depth of the load pipeline, two of which follow the block table.
    """

    rows: int
    tokens: int
    warps: int
    stages: int


@dataclass(frozen=True)
class PrefillTile:
    """How prefilling is cut; attributes as of `DecodeTile`."""

    rows: int
    tokens: int
    warps: int
    stages: int


def check_layout(layout: CacheLayout) -> None:
    """The cache has what the kernels read.

    Raises:
        ValueError: it has not.
    """
    if layout.block_size % TILE:
        raise ValueError(
            f"block_size is {layout.block_size}; the GPU kernels need a multiple of {TILE} tokens: "
            f"start vLLM with --block-size {TILE} or 128"
        )
    if not layout.value_columns:
        raise ValueError(
            "value_columns is False; the GPU kernels read values by columns: make the layout with "
            "value_columns=True"
        )


def key_piece(layout: CacheLayout) -> int:
    """Dimensions of a key that a tile of codes holds: as many as divide a half and a group."""
    return min(layout.half & -layout.half, layout.key_dimensions)


def value_piece(layout: CacheLayout, warps: int) -> int:
    """The same for values."""
    return min(layout.half & -layout.half, layout.value_dimensions, 16 * warps)


def decode_tile(rows: int, layout: CacheLayout, device: Device, *, exact: bool) -> DecodeTile:
    """The tile for `rows` query rows of a request and KV head.

    Args:
        rows: heads of a group times queries.
        layout: the cache's format.
        device: the GPU.
        exact: queries are float32, whose products take no tensor cores and many registers.
    """
    if exact:
        return DecodeTile(rows=16, tokens=32, warps=4, stages=2)
    width, steps, warps = _decode_shape(rows, layout)
    tokens = TILE * (steps if layout.block_size % (steps * TILE) == 0 else 1)
    fits = 3 * tokens * layout.token_bytes <= device.shared_bytes
    return DecodeTile(width, tokens, warps, 5 if fits else 3)


def _decode_shape(rows: int, layout: CacheLayout) -> tuple[int, int, int]:
    """Rows of a program, multiples of 64 positions and warps: few instructions, and no spill.

    A lone warp waits for no other. Two share what would not fit the registers of one, if a half of
    the head is cut into pieces of 32 dimensions, 16 for each.
    """
    size = layout.padded_size
    width = 8 if rows <= 8 or size > 192 else 16
    if size % 64:
        return width, 2 if size <= 96 and width == 8 else 1, 1
    if size == 64:
        return width, width // 8, 1
    if width == 8:
        return width, *((2, 2) if size > 192 else (1, 1))
    return width, 2 if size == 128 else 1, 2


def splits_of(requests: int, heads: int, longest: int, tile: DecodeTile, device: Device) -> int:
    """Programs that share a request and head: as many as fill the GPU, none without a step.

    Where batches are invariant, always as many: a split is a fraction of its request's positions,
    so neither other requests nor their lengths have a say.

    Args:
        requests: of the batch.
        heads: KV heads times tiles of rows.
        longest: positions of the longest request.
        tile: how decoding is cut.
        device: the GPU.
    """
    if batch_invariant():
        return INVARIANT_SPLITS
    programs = device.multiprocessors * WARPS // tile.warps
    wanted = -(-programs // max(requests * heads, 1))
    return max(1, min(wanted, -(-longest // tile.tokens), MOST_SPLITS))


def prefill_tile(rows: int, layout: CacheLayout, device: Device, *, exact: bool) -> PrefillTile:
    """The tile for `rows` query rows of a request and KV head; arguments as of `decode_tile`.

    Where batches are invariant, `rows` has no say: it is the longest request's.
    """
    wide = layout.padded_size > 128
    if exact:
        return PrefillTile(rows=16, tokens=32, warps=8, stages=1)
    if batch_invariant():
        rows = PREFILL_ROWS
    size = max(16, min(64 if wide else PREFILL_ROWS, 1 << max(rows - 1, 0).bit_length()))
    few = size <= 32 and not wide
    # Before Hopper a step's keys and values are in registers, which 128 rows of sums leave few.
    full = device.capability < 90 and size * layout.padded_size > 8192
    tokens = 32 if wide or full else TILE
    return PrefillTile(size, tokens, 4 if few else 8, 2)


def row_warps(layout: CacheLayout) -> int:
    """Warps of a program that rotates 16 heads."""
    return 8 if layout.padded_size > 64 else 4
