"""Attention over an INT4 cache on GPUs: one op writes, one decodes, one does prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder

from quantkit_kernels.kv_int4 import Batch, attend, prefill
from vllm_quantkit.integration.kv_backend import Int4Impl, treatment
from vllm_quantkit.integration.kv_refusals import check_causal
from vllm_quantkit.integration.kv_warm_up import warm_up_gpu


@dataclass(frozen=True)
class Int4CUDAMetadata:
    """One step of a group of layers; nothing of it is read on the host.

    Attributes:
        batch: requests and their blocks: vLLM's own buffers, so that a CUDA graph finds the next
            step's.
        tokens: rows that are no padding, an upper bound where requests are padded.
        slot_mapping: int64 [tokens].
        decodes: True where no request has more queries than a decoding one.
    """

    batch: Batch
    tokens: int
    slot_mapping: Tensor
    decodes: bool


class Int4CUDABuilder(AttentionMetadataBuilder[Int4CUDAMetadata]):  # type: ignore[misc]
    """Graphs are captured for batches whose requests all have 1, or all 1 + drafts, queries."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: bool = True

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
        **more: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **more)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        dtype, decoded = vllm_config.model_config.dtype, range(1, self._decoded + 1)
        for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values():
            warm_up_gpu(layer, kv_cache_spec.block_size, dtype, device, decoded)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Int4CUDAMetadata:
        """The metadata of a step.

        Raises:
            UnsupportedScheme: the step is not causal.
        """
        common = common_attn_metadata
        check_causal(common.causal, self.layer_names)
        batch = Batch(
            block_table=common.block_table_tensor,
            seq_lens=common.seq_lens,
            query_start=common.query_start_loc,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
        )
        decodes = common.max_query_len <= self._decoded
        return Int4CUDAMetadata(batch, common.num_actual_tokens, common.slot_mapping, decodes)

    @property
    def _decoded(self) -> int:
        """Queries of a decoding request at most: 1, or 1 + drafts."""
        return self.reorder_batch_threshold or 1

    def update_block_table(
        self, metadata: Int4CUDAMetadata, blk_table: Tensor, slot_mapping: Tensor
    ) -> Int4CUDAMetadata:
        """The same step for layers whose tokens lie in other blocks."""
        batch = metadata.batch._replace(block_table=blk_table)
        return replace(metadata, batch=batch, slot_mapping=slot_mapping)


class Int4CUDAImpl(Int4Impl):
    """One layer's attention."""

    columns = True

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: Int4CUDAMetadata,
        output: Tensor,
    ) -> None:
        """As `Int4Impl.forward`: `attend` where all requests decode, else `prefill`."""
        attention, rows = self.attention, slice(metadata.tokens)
        sinks = None if attention.sinks is None else attention.sinks.float()
        layout, keys = self.layout(kv_cache), treatment(layer)
        tail = metadata.batch, layout, keys, attention.softmax, sinks
        query, out = query[rows], output[rows]
        if metadata.decodes:
            attend(query, kv_cache, out, *tail)
        else:
            if key is None:  # a layer that reads another's cache; `cached` leaves them unread
                key = value = query[:, : attention.kv_heads]
            raw = not attention.cached
            prefill(query, key[rows], value[rows], kv_cache, out, *tail, raw=raw)
