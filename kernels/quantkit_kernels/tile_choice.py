"""Which tile cuts a product: the measured one where a table has it, else the heuristic's.

Both see the bucket of m, never m, so a layer has few tiles and all can be compiled beforehand.
Where batches are invariant, one tile cuts all: sums along k are then made in one order for every m.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, cast

from quantkit_kernels.code_types import CODE_BOOKS, FLOAT8_DTYPES, CodeType
from quantkit_kernels.scaled_mm.triton_tiles import (
    ScaledTile,
    persistent_refusal,
    select_scaled_tile,
)
from quantkit_kernels.tuning import (
    INVARIANT_TOKENS,
    TILE_K,
    Device,
    batch_invariant,
    bucket_of,
    whole_splits,
)
from quantkit_kernels.tuning_tables import Family, Product, Tiles, measured_tiles
from quantkit_kernels.wna16.triton_tiles import TileConfig, select_tile
from quantkit_kernels.wna16.weights import CONTAINER_BITS, CONTAINER_OF

KEPT = 4096
"""Choices kept: a model has a few layer shapes, each with at most 17 buckets."""

LLM_INT8 = "llm_int8"
"""The name in tables of the kernel for int8 rows with outliers in 16 bits."""


def wna16_tile(
    m: int,
    n: int,
    columns: int,
    bits: int,
    group_size: int,
    code_type: CodeType,
    device: Device,
) -> TileConfig:
    """The tile for y[m, n] with 16-bit activations and weights of `bits` bits in [n, columns].

    Args:
        group_size: as of `select_tile`.

    Raises:
        TableError: a table for this GPU is damaged.
    """
    group = group_size if group_size <= TILE_K else 0
    product = (wna16_kernel(bits, code_type), n, columns, group)
    return cast(TileConfig, _tile(bucket_of(m), *product, device, batch_invariant()))


def scaled_tile(
    m: int, n: int, k: int, block_k: int, grouped: bool, code_type: CodeType, device: Device
) -> ScaledTile:
    """The tile for y[m, n] with 8-bit weights in [n, k] and 8-bit rows.

    Args:
        block_k, grouped: as of `select_scaled_tile`.

    Raises:
        TableError: a table for this GPU is damaged.
    """
    product = (scaled_kernel(code_type), n, k, block_k if grouped else 0)
    return cast(ScaledTile, _tile(bucket_of(m), *product, device, batch_invariant()))


def llm_int8_tile(m: int, n: int, k: int, device: Device) -> ScaledTile:
    """The tile for y[m, n] with int8 weights in [n, k], int8 rows and outliers in 16 bits.

    Raises:
        TableError: a table for this GPU is damaged.
    """
    return cast(ScaledTile, _tile(bucket_of(m), LLM_INT8, n, k, 0, device, batch_invariant()))


def wna16_kernel(bits: int, code_type: str) -> str:
    """A kernel's name in tables: `wna16-int4`, `wna16-nf4`."""
    return f"wna16-int{bits}" if code_type == "int" else f"wna16-{code_type}"


def scaled_kernel(code_type: str) -> str:
    """A kernel's name in tables: `scaled-int8`, `scaled-e4m3`."""
    return "scaled-int8" if code_type == "int" else f"scaled-{code_type}"


@lru_cache(maxsize=KEPT)
def _tile(
    tokens: int, kernel: str, n: int, k: int, group: int, device: Device, invariant: bool
) -> Any:
    product = Product(kernel, n, k, group)
    heuristic = KERNELS[kernel].heuristic
    if invariant:
        return replace(heuristic(product, INVARIANT_TOKENS, device), splits=1)
    measured = tiles_of(device).get((product, tokens))
    return heuristic(product, tokens, device) if measured is None else measured


@lru_cache(maxsize=16)
def tiles_of(device: Device) -> Tiles:
    """All tiles measured for a device; read once in a process.

    Raises:
        TableError: a table for this GPU is damaged.
    """
    return measured_tiles(device, KERNELS)


def forget_tables() -> None:
    """Read tables again when a tile is next chosen."""
    tiles_of.cache_clear()
    _tile.cache_clear()


def _wna16_heuristic(
    bits: int, code_type: str, product: Product, m: int, device: Device
) -> TileConfig:
    shape, group_size = (m, product.n, product.k), product.group or product.k
    return select_tile(*shape, bits, group_size, device, code_book=code_type in CODE_BOOKS)


def _scaled_heuristic(product: Product, m: int, device: Device) -> ScaledTile:
    step = (product.group or TILE_K, product.group > 0)
    persistent = product.kernel != LLM_INT8
    return select_scaled_tile(m, product.n, product.k, *step, device, persistent=persistent)


def _wna16_refusal(bits: int, tile: TileConfig, product: Product, device: Device) -> str:
    if product.k % TILE_K:
        return f"k is {product.k}, but weights have a multiple of {TILE_K} columns"
    if not tile.scale_weights and product.group not in (0, TILE_K):
        return f"scale_weights is false, which groups of {product.group} do not allow"
    if tile.dense:
        return ""
    step_bytes = TILE_K * (16 * tile.block_m + bits * tile.block_n) // 8
    return _memory_refusal(tile.stages, step_bytes, device) or _splits_refusal(
        tile.splits, product.k // TILE_K
    )


def _scaled_refusal(tile: ScaledTile, product: Product, device: Device) -> str:
    if product.group and tile.block_k > product.group:
        return f"a step of {tile.block_k} columns has more than one scale"
    if tile.persistent and product.kernel == LLM_INT8:
        return "persistent is true, which this kernel is not"
    if tile.persistent and (reason := persistent_refusal(tile, device)):
        return reason
    step_bytes = tile.block_k * (tile.block_m + tile.block_n)
    return _memory_refusal(tile.stages, step_bytes, device) or _splits_refusal(
        tile.splits, -(-product.k // tile.block_k)
    )


def _memory_refusal(stages: int, step_bytes: int, device: Device) -> str:
    """Compilers keep the operands of a step for each stage, some for one stage fewer."""
    needed = (stages - 1) * step_bytes
    if needed <= device.shared_bytes:
        return ""
    return f"it takes {needed} bytes of shared memory, but the GPU has {device.shared_bytes}"


def _splits_refusal(splits: int, steps: int) -> str:
    if splits <= steps and splits == whole_splits(splits, steps):
        return ""
    return f"of {splits} splits some have none of the {steps} steps along k"


def _wna16_family(bits: int, code_type: str) -> Family:
    return Family(
        TileConfig,
        partial(_wna16_refusal, bits),
        partial(_wna16_heuristic, bits, code_type),
    )


def _kernels() -> dict[str, Family]:
    weights = [(bits, "int") for bits in CONTAINER_BITS]
    weights += [(bits, code_type) for code_type, bits in CONTAINER_OF.items()]
    wna16 = {wna16_kernel(*kind): _wna16_family(*kind) for kind in weights}
    family = Family(ScaledTile, _scaled_refusal, _scaled_heuristic)
    scaled = {scaled_kernel(code_type): family for code_type in ("int", *FLOAT8_DTYPES)}
    return wna16 | scaled | {LLM_INT8: family}


KERNELS = _kernels()
"""All that tables may name."""
