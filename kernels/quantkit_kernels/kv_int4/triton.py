"""CUDA: launches the Triton kernels.

No launch synchronises, and neither its shape nor what it allocates depends on values on the GPU,
so all may be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.treatment import Batch, KeyTreatment, Softmax
from quantkit_kernels.kv_int4.triton_attend import attend
from quantkit_kernels.kv_int4.triton_launch import (
    LOG2_E,
    ROWS,
    contiguous,
    factor_of,
    groups_of,
    head_of,
    head_signs,
)
from quantkit_kernels.kv_int4.triton_prefill import prefill_rows
from quantkit_kernels.kv_int4.triton_tiles import check_layout, prefill_tile, row_warps
from quantkit_kernels.kv_int4.triton_write import gather_heads, write_heads
from quantkit_kernels.triton_common import device_of

__all__ = ["attend", "gather", "prefill", "write"]


def write(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slots: Tensor,
    layout: CacheLayout,
    treatment: KeyTreatment,
) -> None:
    """As `op.write`, in one launch.

    Raises:
        ValueError: the kernels do not read such a layout.
    """
    check_layout(layout)
    tokens = slots.shape[0]
    if not tokens:
        return
    with torch.cuda.device_of(key):
        write_heads[(triton.cdiv(tokens, ROWS), key.shape[1], 2)](
            key,
            value,
            contiguous(treatment.shift),
            contiguous(treatment.scale),
            head_signs(layout.head_size, key.device),
            cache,
            slots.contiguous(),
            tokens,
            *key.stride()[:2],
            *value.stride()[:2],
            *cache.stride()[:2],
            layout.padded_size**-0.5,
            **head_of(layout),
            **groups_of(layout),
            M=ROWS,
            ASM=key.is_cuda,
            num_warps=row_warps(layout),
            enable_fp_fusion=True,
        )


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    out: Tensor,
    batch: Batch,
    layout: CacheLayout,
    treatment: KeyTreatment,
    softmax: Softmax,
    sinks: Tensor | None = None,
    *,
    raw: bool = True,
) -> None:
    """As `op.prefill`, in one launch.

    Raises:
        ValueError: the kernels do not read such a layout.
    """
    check_layout(layout)
    requests, group = batch.seq_lens.shape[0], query.shape[1] // cache.shape[1]
    if not (requests and query.shape[0] and batch.max_query_len):
        return
    rows = group * batch.max_query_len
    exact = query.dtype == torch.float32
    tile = prefill_tile(rows, layout, device_of(query), exact=exact)
    with torch.cuda.device_of(query):
        prefill_rows[(triton.cdiv(rows, tile.rows), cache.shape[1], requests)](
            query,
            key,
            value,
            contiguous(treatment.shift),
            contiguous(treatment.scale),
            sinks,
            head_signs(layout.head_size, query.device),
            cache,
            batch.block_table,
            batch.seq_lens,
            batch.query_start,
            out,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            *out.stride()[:2],
            batch.block_table.stride(0),
            *cache.stride()[:2],
            factor_of(softmax),
            softmax.softcap * LOG2_E,
            layout.padded_size**-0.5,
            G=group,
            **head_of(layout),
            **groups_of(layout),
            N=tile.tokens,
            M=tile.rows,
            WINDOW=softmax.window,
            CAPPED=softmax.softcap > 0,
            RAW=raw,
            STAGES=tile.stages,
            ASM=query.is_cuda,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )


def gather(
    cache: Tensor,
    blocks: Tensor,
    start: int,
    stop: int,
    keys: Tensor,
    values: Tensor,
    layout: CacheLayout,
) -> None:
    """As `op.gather`, in one launch.

    Raises:
        ValueError: the kernels do not read such a layout.
    """
    check_layout(layout)
    if stop <= start:
        return
    with torch.cuda.device_of(cache):
        gather_heads[(triton.cdiv(stop - start, ROWS), cache.shape[1])](
            cache,
            blocks.contiguous(),
            keys,
            values,
            start,
            stop,
            *cache.stride()[:2],
            *keys.stride()[:2],
            *values.stride()[:2],
            HALF=layout.half,
            **groups_of(layout),
            M=ROWS,
        )
