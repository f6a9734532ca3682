"""vLLM's Triton kernels that decode over a KV cache of 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.kernel_report.linear_peers import HOPPER
from benchmarks.kernel_report.sources import kernels_of
from tests.kernels.aot import Compiled, compile_kernel
from tests.kernels.gates import Gate

HEADS = ((64, 4), (128, 4), (128, 8), (256, 4))
"""(head size, query heads that share a KV head)."""

INT4_WARPS = 4
TURBOQUANT_TOKENS = 4
"""Positions of a step of `_tq_decode_stage1`, in one warp."""


def kv_gates(vllm: Path) -> Iterator[Gate]:
    """`int4_per_token_head` with and without splits, and `turboquant_4bit_nc`."""
    ops = vllm / "v1" / "attention" / "ops"
    helpers = (ops / "triton_attention_helpers.py", ops / "triton_unified_attention.py")
    packed = kernels_of(*helpers, ops / "int4_per_token_head.py")._attn_packed
    for (size, group), split in ((head, split) for head in HEADS for split in (True, False)):
        tokens = 16 if split else 32
        yield Gate(
            f"vLLM int4_per_token_head{' split' * split} D{size} GQA{group}",
            HOPPER,
            partial(_int4, packed, size, group, tokens, split),
            partial(_per_value, threads=32 * INT4_WARPS, values=tokens * 2 * size),
        )
    stage1 = kernels_of(ops / "triton_turboquant_decode.py")._tq_decode_stage1
    for size, group in HEADS:
        yield Gate(
            f"vLLM turboquant_4bit_nc D{size} GQA{group}",
            HOPPER,
            partial(_turboquant, stage1, size, group),
            # Each query head reads the cache anew.
            partial(_per_value, threads=32 * group, values=TURBOQUANT_TOKENS * 2 * size),
        )


def _per_value(compiled: Compiled, threads: int, values: int) -> float:
    return compiled.main_loop.total() * threads / values


def _int4(kernel: Any, size: int, group: int, tokens: int, split: bool) -> Compiled:
    pointers = dict.fromkeys(
        ("segm_output_ptr", "segm_max_ptr", "segm_expsum_ptr", "k_scale_cache_ptr",
         "v_scale_cache_ptr"), "*fp32",
    )  # fmt: skip
    pointers |= dict.fromkeys(("output_ptr", "query_ptr"), "*bf16")
    pointers |= dict.fromkeys(("key_cache_ptr", "value_cache_ptr"), "*u8")
    pointers |= dict.fromkeys(("block_tables_ptr", "seq_lens_ptr", "query_start_len_ptr"), "*i32")
    constants = _int4_constants(size, group, tokens, split)
    floats = dict.fromkeys(("scale", "out_scale", "softcap"), "fp32")
    types = dict.fromkeys(kernel.arg_names, "i64") | floats | pointers | {"num_seqs": "i32"}
    aligned = tuple(name for name in pointers if name not in constants)
    return compile_kernel(kernel, types, constants, aligned, HOPPER.capability, INT4_WARPS)


def _int4_constants(size: int, group: int, tokens: int, split: bool) -> dict[str, Any]:
    absent = ("sink_ptr", "alibi_slopes_ptr", "qq_bias_ptr", "mm_prefix_range_ptr")
    off = ("USE_ALIBI_SLOPES", "USE_ALIBI_SQRT", "USE_QQ_BIAS", "USE_SOFTCAP", "USE_SINKS",
           "USE_MM_PREFIX", "USE_FP8")  # fmt: skip
    return {**dict.fromkeys(absent), **dict.fromkeys(off, False)} | {
        "num_query_heads": 8 * group,
        "num_queries_per_kv": group,
        "BLOCK_SIZE": 16,
        "TILE_SIZE": tokens,
        "HEAD_SIZE": size,
        "HEAD_SIZE_PADDED": size,
        "PACKED_HEAD_PADDED": size // 2,
        "SLIDING_WINDOW": 0,
        "MAX_MM_RANGES": 0,
        "stride_k_cache_3": 1,
        "stride_v_cache_3": 1,
        "BLOCK_Q": 16 // group,
        "BLOCK_M": 16,
        "NUM_SEGMENTS_PER_SEQ": 16 if split else 1,
        "IS_3D": split,
        "PACKING_FACTOR": 2,
        "FP8_MIN": -448.0,
        "FP8_MAX": 448.0,
    }


def _turboquant(kernel: Any, size: int, group: int) -> Compiled:
    pointers = dict.fromkeys(("Q_rot_ptr", "Centroids_ptr", "Mid_o_ptr"), "*fp32")
    pointers |= dict.fromkeys(("Block_table_ptr", "Seq_lens_ptr"), "*i32")
    pointers |= {"KV_cache_ptr": "*u8"}
    constants = {
        "NUM_KV_HEADS": 8,
        "HEAD_DIM": size,
        "BLOCK_SIZE": 16,
        "NUM_KV_SPLITS": 32,
        "KV_GROUP_SIZE": group,
        "MSE_BITS": 4,
        "MSE_BYTES": size // 2,
        "KPS": size // 2 + 2,
        "VQB": 4,
        "VAL_DATA_BYTES": size // 2,
        "ATTN_SCALE": size**-0.5,
        "BLOCK_D": size,
        "BLOCK_KV": TURBOQUANT_TOKENS,
        "KEY_FP8": 0,
        "NORM_CORRECTION": 1,
        "FP8_E4B15": 0,
    }
    types = dict.fromkeys(kernel.arg_names, "i32") | pointers
    return compile_kernel(kernel, types, constants, tuple(pointers), HOPPER.capability, 1)
