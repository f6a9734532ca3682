"""Tiles to try: those that differ from a good one in one respect. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from quantkit_kernels.tile_choice import KERNELS
from quantkit_kernels.tuning import TILE_K, Device, whole_splits
from quantkit_kernels.tuning_tables import Product

RANGES = {"block_m": (16, 256), "block_n": (64, 128), "warps": (4, 8), "stages": (2, 8)}
"""Smallest and largest value that is tried; weights are padded to 128 rows."""


def neighbours(tile: Any, product: Product, device: Device) -> list[Any]:
    """Tiles one step away, best guesses first, without those that cannot run.

    Blocks and warps are doubled or halved, stages are one more or fewer, splits also; what is true
    or false is turned round.
    """
    refusal = KERNELS[product.kernel].refusal
    found = dict.fromkeys(_steps(tile, product))
    return [near for near in found if near != tile and not refusal(near, product, device)]


def _steps(tile: Any, product: Product) -> Iterator[Any]:
    if getattr(tile, "dense", False):
        yield replace(tile, dense=False)
        return
    for splits in _splits(tile, product):
        yield replace(tile, splits=splits)
    for name in ("stages", "block_n", "block_m", "warps"):
        value = getattr(tile, name)
        steps = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
        low, high = RANGES[name]
        for step in steps:
            if min(low, value) <= step <= max(high, value):
                yield replace(tile, **{name: step})
    for field in fields(tile):
        if isinstance(getattr(tile, field.name), bool):
            yield replace(tile, **{field.name: not getattr(tile, field.name)})


def _splits(tile: Any, product: Product) -> list[int]:
    """Fewer and more splits, none of which is empty."""
    steps = -(-product.k // getattr(tile, "block_k", TILE_K))
    wanted = (tile.splits // 2, tile.splits - 1, tile.splits + 1, tile.splits * 2)
    return [whole_splits(count, steps) for count in wanted if 1 <= count <= steps]
