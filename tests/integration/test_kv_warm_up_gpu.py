"""What the INT4 cache launches when it is made is all that attention launches on a GPU."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from quantkit_kernels.kv_int4 import Softmax
from tests.kernels.launch_keys import LaunchKeys, launch_keys
from vllm_quantkit.integration import kv_cuda
from vllm_quantkit.integration.kv_backend import SCALE, SHIFT, Groups, LayerAttention
from vllm_quantkit.integration.kv_cuda import Int4CUDABuilder, Int4CUDAImpl

__all__ = ["launch_keys"]

BLOCK, BLOCKS, SIZE = 128, 70, 64
LAYER = "layer"
DRAFTS = 2
STEPS = [
    *product((1, 2, 3, 17), (1, 2, 3), (1, 300, 5000)),
    *product((1, 2, 9), (4, 7, 16, 33, 60, 129, 1000), (0, 700)),
]
"""Requests, queries of each, and tokens before them: decoding with drafts, and prompts."""


def layer_of(*, treated: bool, heads: tuple[int, int], softmax: Softmax, sinks: bool) -> nn.Module:
    layer: Any = nn.Module()
    if treated:
        layer.register_buffer(SHIFT, torch.zeros(heads[1], SIZE))
        layer.register_buffer(SCALE, torch.ones(heads[1], SIZE))
    logits = torch.zeros(heads[0], dtype=torch.bfloat16) if sinks else None
    layer.impl = Int4CUDAImpl(LayerAttention(*heads, SIZE, softmax, Groups(32, 64), False, logits))
    return layer


def builder_of(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Int4CUDABuilder:
    """As vLLM makes one when it has the cache."""
    monkeypatch.setattr(kv_cuda, "get_layers_from_vllm_config", lambda *_: {LAYER: layer})
    speculative = SimpleNamespace(num_speculative_tokens=DRAFTS, parallel_drafting=False)
    config = SimpleNamespace(
        speculative_config=speculative,
        use_v2_model_runner=False,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
    )
    spec = SimpleNamespace(block_size=BLOCK)
    return Int4CUDABuilder(spec, [LAYER], config, torch.device("cpu"))


def serve(layer: Any, builder: Int4CUDABuilder, requests: int, queries: int, before: int) -> None:
    """One step, its keys and values views of one product, as vLLM's attention layers pass them."""
    impl: Int4CUDAImpl = layer.impl
    heads, kv_heads, tokens = impl.num_heads, impl.num_kv_heads, requests * queries
    size = impl.attention.groups.token_bytes(SIZE)
    cache = torch.zeros(BLOCKS, kv_heads, BLOCK, size, dtype=torch.uint8)
    every = torch.zeros(tokens, (heads + 2 * kv_heads) * SIZE, dtype=torch.bfloat16)
    query, key, value = (
        part.view(tokens, -1, SIZE)
        for part in every.split([heads * SIZE, kv_heads * SIZE, kv_heads * SIZE], -1)
    )
    common = SimpleNamespace(
        query_start_loc=torch.arange(requests + 1, dtype=torch.int32) * queries,
        seq_lens=torch.full((requests,), before + queries, dtype=torch.int32),
        block_table_tensor=torch.zeros(requests, 63, dtype=torch.int32),
        slot_mapping=torch.arange(tokens) % BLOCK,
        max_query_len=queries,
        max_seq_len=before + queries,
        num_actual_tokens=tokens,
        causal=True,
    )
    metadata = builder.build(0, common)
    impl.do_kv_cache_update(layer, key, value, cache, common.slot_mapping)
    impl.forward(layer, query, key, value, cache, metadata, torch.empty_like(query))


@pytest.mark.parametrize("case", [
    {"treated": True, "heads": (8, 2), "softmax": Softmax(0.1), "sinks": False},
    {"treated": False, "heads": (16, 1), "softmax": Softmax(0.1, window=64), "sinks": True},
    {"treated": True, "heads": (2, 2), "softmax": Softmax(0.1, softcap=5.0), "sinks": False},
], ids=["GQA 4", "GQA 16, window, sinks", "MHA, capped"])  # fmt: skip
def test_no_step_launches_what_was_not_compiled(
    case: dict[str, Any], launch_keys: LaunchKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(**case)
    builder = builder_of(layer, monkeypatch)
    compiled = set(launch_keys.seen)
    assert {name for name, _ in compiled} >= {"write_heads", "attend_split", "prefill_rows"}
    for step in STEPS:
        serve(layer, builder, *step)
    assert launch_keys.seen - compiled == set()
