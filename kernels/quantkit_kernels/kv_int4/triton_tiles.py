"""How the Triton kernels of the cache are cut: pure functions of shapes the host knows."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.tuning import Device

TILE = 64
"""A block holds a multiple of so many tokens."""

WAVES = 6
"""Programs of decoding for each multiprocessor: what its registers hold, and one to come."""

MOST_SPLITS = 128


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


def value_piece(layout: CacheLayout) -> int:
    """The same for values."""
    return min(layout.half & -layout.half, layout.value_dimensions)


def decode_tile(rows: int, layout: CacheLayout, device: Device, *, exact: bool) -> DecodeTile:
    """The tile for `rows` query rows of a request and KV head.

    Args:
        rows: heads of a group times queries.
        layout: the cache's format.
        device: the GPU.
        exact: queries are float32, whose products take no tensor cores and many registers.
    """
    wide = layout.padded_size > 128
    if exact:
        return DecodeTile(rows=16, tokens=32 if wide else TILE, warps=8, stages=2)
    newest, oldest = device.capability >= 100, device.capability < 90
    width = 8 if rows <= 8 else 16 if rows <= 16 or wide or newest else 32
    tokens = 32 if wide and width == 16 else TILE
    if width == 8 and layout.block_size % (2 * TILE) == 0 and not (wide and oldest):
        tokens = 2 * TILE
    fits = 3 * tokens * layout.token_bytes <= device.shared_bytes
    return DecodeTile(width, tokens, 4 if width == 32 else 2, 5 if fits else 3)


def splits_of(requests: int, heads: int, longest: int, tokens: int, device: Device) -> int:
    """Programs that share a request and head: as many as fill the GPU, none without a step."""
    wanted = -(-WAVES * device.multiprocessors // max(requests * heads, 1))
    return max(1, min(wanted, -(-longest // tokens), MOST_SPLITS))


def prefill_tile(rows: int, layout: CacheLayout, *, exact: bool) -> PrefillTile:
    """The tile for `rows` query rows of a request and KV head; arguments as of `decode_tile`."""
    wide = layout.padded_size > 128
    if exact:
        return PrefillTile(rows=16, tokens=32, warps=8, stages=1)
    size = max(16, min(64 if wide else 128, 1 << max(rows - 1, 0).bit_length()))
    few = size <= 32 and not wide
    return PrefillTile(size, 32 if wide else TILE, 4 if few else 8, 2)


def row_warps(layout: CacheLayout) -> int:
    """Warps of a program that rotates 16 heads."""
    return 8 if layout.padded_size > 64 else 4
