"""CUDA: launches what a few queries a request need."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.treatment import Batch, KeyTreatment, Softmax
from quantkit_kernels.kv_int4.triton_decode import attend_split
from quantkit_kernels.kv_int4.triton_launch import (
    LOG2_E,
    ROWS,
    contiguous,
    factor_of,
    groups_of,
    head_of,
    head_signs,
)
from quantkit_kernels.kv_int4.triton_merge import merge_splits
from quantkit_kernels.kv_int4.triton_rotate import rotate_queries
from quantkit_kernels.kv_int4.triton_tiles import (
    DecodeTile,
    check_layout,
    decode_tile,
    key_piece,
    row_warps,
    splits_of,
    value_piece,
)
from quantkit_kernels.triton_common import device_of
from quantkit_kernels.tuning import batch_invariant


def attend(
    query: Tensor,
    cache: Tensor,
    out: Tensor,
    batch: Batch,
    layout: CacheLayout,
    treatment: KeyTreatment,
    softmax: Softmax,
    sinks: Tensor | None = None,
) -> None:
    """As `op.attend`: queries are rotated, splits of the positions attended to, and merged.

    Raises:
        ValueError: the kernels do not read such a layout.
    """
    check_layout(layout)
    requests = batch.seq_lens.shape[0]
    if not (requests and query.shape[0] and batch.max_query_len and batch.max_seq_len):
        return
    group = query.shape[1] // cache.shape[1]
    rows = group * batch.max_query_len
    device, exact = device_of(query), query.dtype == torch.float32
    tile = decode_tile(group if batch_invariant() else rows, layout, device, exact=exact)
    programs = cache.shape[1] * triton.cdiv(rows, tile.rows)
    splits = splits_of(requests, programs, batch.max_seq_len, tile, device)
    with torch.cuda.device_of(query):
        run_attend(query, cache, out, batch, layout, treatment, softmax, sinks, tile, splits)


def run_attend(
    query: Tensor,
    cache: Tensor,
    out: Tensor,
    batch: Batch,
    layout: CacheLayout,
    treatment: KeyTreatment,
    softmax: Softmax,
    sinks: Tensor | None,
    tile: DecodeTile,
    splits: int,
) -> None:
    """`attend`, cut as `tile` says."""
    shape = (splits, *query.shape[:2])
    partial = torch.empty(*shape, layout.padded_size, dtype=torch.float32, device=query.device)
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    shifts = softmax.softcap > 0 or sinks is not None
    rotated, products = rotated_queries(query, cache, layout, treatment, softmax, shifts=shifts)
    capped = softmax.softcap > 0
    kept = products if capped else None
    _launch_splits(rotated, kept, cache, batch, layout, softmax, tile, partial, lse)
    merge_splits[(batch.seq_lens.shape[0], batch.max_query_len, cache.shape[1])](
        partial,
        lse,
        None if capped else products,
        sinks,
        head_signs(layout.head_size, query.device),
        batch.seq_lens,
        batch.query_start,
        out,
        query.shape[0],
        query.shape[1],
        *out.stride()[:2],
        splits,
        layout.padded_size**-0.5,
        G=query.shape[1] // cache.shape[1],
        **head_of(layout),
        WINDOW=softmax.window,
        N=tile.tokens,
        R=max(ROWS, triton.next_power_of_2(query.shape[1] // cache.shape[1])),
        ASM=query.is_cuda,
        num_warps=row_warps(layout),
        enable_fp_fusion=True,
    )


def rotated_queries(
    query: Tensor,
    cache: Tensor,
    layout: CacheLayout,
    treatment: KeyTreatment,
    softmax: Softmax,
    *,
    shifts: bool,
) -> tuple[Tensor, Tensor | None]:
    """q' [T, Hq, P], whose products with k' are logits as `factor_of` says; q . mu alike.

    Args:
        shifts: q . mu matters; without it, or without a shift, it is None.
    """
    tokens, heads = query.shape[:2]
    rotated = query.new_empty(tokens, heads, layout.padded_size)
    shift = contiguous(treatment.shift) if shifts else None
    products = None
    if shift is not None:
        products = torch.empty(tokens, heads, dtype=torch.float32, device=query.device)
    rotate_queries[(triton.cdiv(tokens * heads, ROWS),)](
        query,
        shift,
        contiguous(treatment.scale),
        head_signs(layout.head_size, query.device),
        rotated,
        products,
        tokens * heads,
        heads,
        *query.stride()[:2],
        factor_of(softmax),
        layout.padded_size**-0.5,
        G=heads // cache.shape[1],
        **head_of(layout),
        M=ROWS,
        ASM=query.is_cuda,
        num_warps=row_warps(layout),
        enable_fp_fusion=True,
    )
    return rotated, products


def _launch_splits(
    rotated: Tensor,
    products: Tensor | None,
    cache: Tensor,
    batch: Batch,
    layout: CacheLayout,
    softmax: Softmax,
    tile: DecodeTile,
    partial: Tensor,
    lse: Tensor,
) -> None:
    splits, tokens, heads = lse.shape
    group = heads // cache.shape[1]
    tiles = triton.cdiv(group * batch.max_query_len, tile.rows)
    attend_split[(batch.seq_lens.shape[0], cache.shape[1] * tiles, splits)](
        rotated,
        products,
        cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start,
        partial,
        lse,
        tokens,
        heads,
        batch.block_table.stride(0),
        *cache.stride()[:2],
        splits,
        softmax.softcap * LOG2_E,
        G=group,
        HALF=layout.half,
        **groups_of(layout),
        KEY_PIECE=key_piece(layout),
        VALUE_PIECE=value_piece(layout, tile.warps),
        N=tile.tokens,
        R=tile.rows,
        MANY=batch.max_query_len > 1 or batch_invariant(),
        WINDOW=softmax.window,
        CAPPED=softmax.softcap > 0,
        STAGES=tile.stages,
        ASM=rotated.is_cuda,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
