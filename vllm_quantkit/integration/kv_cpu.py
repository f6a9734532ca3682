"""Attention over an INT4 cache on CPUs: our op decodes, vLLM's own kernel does prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionMetadataBuilder

from quantkit_kernels.kv_int4 import Batch, attend
from vllm_quantkit.integration.kv_backend import Int4Impl, LayerAttention, treatment
from vllm_quantkit.integration.kv_prompts import PromptStep, Scratch, attend_pass
from vllm_quantkit.integration.kv_refusals import check_causal
from vllm_quantkit.integration.kv_steps import (
    FEW_QUERIES,
    Piece,
    Step,
    bound,
    calls,
    pieces,
    plan,
)
from vllm_quantkit.integration.kv_warm_up import warm_up_cpu

READ_BYTES = 64 << 20
"""What the sums of one call of `attend` take at most, unless those of one request take more."""


class Read(NamedTuple):
    """One call of `attend`.

    Attributes:
        rows: int64 [t], of the step; None for all of them.
        batch: the requests, or pieces of them, with their rows in order.
    """

    rows: Tensor | None
    batch: Batch


@dataclass
class Int4CPUMetadata:
    """One step of a group of layers.

    Attributes:
        batch: requests and their blocks.
        tokens: rows that are no padding.
        query_start, seq_lens: those of the batch, as numbers.
        prompts: what those that need 16-bit copies share.
    """

    batch: Batch
    tokens: int
    query_start: list[int]
    seq_lens: list[int]
    prompts: PromptStep
    _steps: dict[tuple[int, int], Step] = field(default_factory=dict)
    _reads: dict[tuple[tuple[int, ...], int], list[Read]] = field(default_factory=dict)

    def step(self, attention: LayerAttention, dtype: torch.dtype) -> Step:
        """Who reads the cache and who needs a copy."""
        window = attention.softmax.window
        if attention.cached:
            requests = [i for i, stop in enumerate(self.seq_lens) if stop]
            return Step(tuple(requests), ())
        capacity = self.prompts.scratch.tokens(attention, dtype)
        known, name = self._steps, (window, capacity)
        if name not in known:
            known[name] = plan(self.query_start, self.seq_lens, window=window, capacity=capacity)
        return known[name]

    def reads(self, requests: tuple[int, ...], attention: LayerAttention) -> list[Read]:
        """The calls that serve requests from the cache."""
        budget = READ_BYTES // (4 * attention.heads * attention.head_size)
        name = requests, budget
        if name not in self._reads:
            cut = pieces(self.query_start, self.seq_lens, requests)
            self._reads[name] = [self._read(group, len(cut)) for group in calls(cut, budget)]
        return self._reads[name]

    def _read(self, group: list[Piece], count: int) -> Read:
        """The step itself where it is all that is asked for."""
        longest = self.batch.max_query_len
        if len(group) == count == len(self.seq_lens) and longest <= FEW_QUERIES:
            return Read(None, self.batch._replace(max_query_len=bound(longest)))
        rows = [row for piece in group for row in range(piece.first, piece.first + piece.queries)]
        starts = accumulate((piece.queries for piece in group), initial=0)
        batch = Batch(
            block_table=self.batch.block_table[[piece.request for piece in group]],
            seq_lens=torch.tensor([piece.tokens for piece in group], dtype=torch.int32),
            query_start=torch.tensor(list(starts), dtype=torch.int32),
            max_query_len=bound(max(piece.queries for piece in group)),
            max_seq_len=max(piece.tokens for piece in group),
        )
        return Read(torch.tensor(rows), batch)


class Int4CPUBuilder(AttentionMetadataBuilder[Int4CPUMetadata]):  # type: ignore[misc]
    """The metadata of a group of layers."""

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
        **more: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **more)
        self._scratch = Scratch()
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for layer in layers.values():
            warm_up_cpu(layer, kv_cache_spec.block_size, vllm_config.model_config.dtype)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Int4CPUMetadata:
        """The metadata of a step.

        Raises:
            UnsupportedScheme: the step is not causal.
        """
        common = common_attn_metadata
        check_causal(common.causal, self.layer_names)
        query_start, seq_lens = common.query_start_loc.tolist(), common.seq_lens.tolist()
        batch = Batch(
            block_table=common.block_table_tensor,
            seq_lens=common.seq_lens,
            query_start=common.query_start_loc,
            max_query_len=common.max_query_len,
            max_seq_len=max(common.max_seq_len, *seq_lens),
        )
        rows = common.num_actual_tokens
        prompts = PromptStep(batch.block_table, self._scratch)
        return Int4CPUMetadata(batch, rows, query_start, seq_lens, prompts)


class Int4CPUImpl(Int4Impl):
    """One layer's attention."""

    columns = False

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: Int4CPUMetadata,
        output: Tensor,
    ) -> None:
        """As `Int4Impl.forward`, request by request: see `kv_steps.plan`."""
        rows = slice(metadata.tokens)
        query, output = query[rows], output[rows]
        step = metadata.step(self.attention, query.dtype)
        for read in metadata.reads(step.few, self.attention):
            self._read(layer, query, kv_cache, read, output)
        for one in step.passes:
            attend_pass(self, layer, (query, key, value), kv_cache, metadata.prompts, one, output)

    def _read(
        self, layer: nn.Module, query: Tensor, kv_cache: Tensor, read: Read, output: Tensor
    ) -> None:
        attention = self.attention
        sinks = None if attention.sinks is None else attention.sinks.float()
        tail = read.batch, self.layout(kv_cache), treatment(layer), attention.softmax, sinks
        if read.rows is None:
            attend(query, kv_cache, output, *tail)
            return
        out = output.new_empty(len(read.rows), *output.shape[1:])
        attend(query[read.rows], kv_cache, out, *tail)
        output[read.rows] = out
