"""What `kv_decode` compares: our 4-bit cache, vLLM's of 16 and 8 bits, eager PyTorch over ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from quantkit_kernels import kv_int4
from quantkit_kernels.kv_int4 import Batch, CacheLayout, KeyTreatment, Softmax, generic

HEADS, KV_HEADS, HEAD_SIZE, BLOCK = 32, 8, 128, 128
DTYPE = torch.bfloat16
SOFTMAX = Softmax(HEAD_SIZE**-0.5)
LAYOUT = CacheLayout(HEAD_SIZE, BLOCK)

INT4, BF16, FP8, EAGER = "int4", "vLLM bf16", "vLLM fp8", "eager"

KERNEL_MAX_ERROR = 3e-3
"""Of a result beside float32 attention over the same numbers: rounded to bfloat16."""
VLLM_MAX_ERROR = 1e-2
"""The same with probabilities in bfloat16."""
FP8_MAX_ERROR = 0.15
"""Of E4M3 beside keys and values of 16 bits: vLLM cuts off what does not fit, up to 2^-3 each."""


class Cache(Protocol):
    """One layer's cache, and attention over it."""

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write tokens."""

    def attend(self, query: Tensor, out: Tensor) -> None:
        """out = attention of the batch's queries."""


@dataclass
class Ours:
    """A cache of 4 bits with a treatment of keys; every call rotates."""

    cache: Tensor
    batch: Batch
    treatment: KeyTreatment
    run: Callable[..., None] = kv_int4.attend

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """As in `Cache`."""
        kv_int4.write(key, value, self.cache, slots, LAYOUT, self.treatment)

    def attend(self, query: Tensor, out: Tensor) -> None:
        """As in `Cache`."""
        self.run(query, self.cache, out, self.batch, LAYOUT, self.treatment, SOFTMAX)


class VLLM:
    """vLLM's C++ kernels; what they plan for a step is planned once."""

    def __init__(self, memory: Tensor, batch: Batch, kind: str = "auto") -> None:
        self.batch, self.kind = batch, kind
        self.keys, self.values = memory.chunk(2, dim=2)
        self.isa = _get_attn_isa(DTYPE, BLOCK, HEAD_SIZE, kind)
        self.schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(batch.seq_lens),
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_SIZE,
            seq_lens=batch.seq_lens,
            dtype=DTYPE,
            query_start_loc=batch.query_start,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
            kv_cache_dtype=kind,
        )

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """As in `Cache`."""
        ops.cpu_attn_reshape_and_cache(
            key, value, self.keys, self.values, slots, self.isa, kv_cache_dtype=self.kind
        )

    def attend(self, query: Tensor, out: Tensor) -> None:
        """As in `Cache`."""
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self.keys,
            value_cache=self.values,
            output=out,
            query_start_loc=self.batch.query_start,
            seq_lens=self.batch.seq_lens,
            scale=SOFTMAX.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.batch.block_table,
            softcap=0.0,
            scheduler_metadata=self.schedule,
            s_aux=None,
            kv_cache_dtype=self.kind,
        )


def make_batch(requests: int, context: int, queries: int = 1) -> Batch:
    """Requests of one length whose blocks lie anywhere."""
    each = -(-context // BLOCK)
    return Batch(
        block_table=torch.randperm(requests * each, dtype=torch.int32).view(requests, each),
        seq_lens=torch.full((requests,), context, dtype=torch.int32),
        query_start=torch.arange(requests + 1, dtype=torch.int32) * queries,
        max_query_len=queries,
        max_seq_len=context,
    )


def random_cache(name: str, batch: Batch) -> Cache:
    """A contender's cache, full of random numbers."""
    blocks, shape = batch.block_table.numel(), (KV_HEADS, 2 * BLOCK, HEAD_SIZE)
    if name == BF16:
        return VLLM(torch.empty(blocks, *shape, dtype=DTYPE).normal_(), batch)
    if name == FP8:
        # Codes below that of NaN.
        codes = torch.randint(0, 100, (blocks, *shape), dtype=torch.uint8)
        return VLLM(codes, batch, "fp8_e4m3")
    shape = (blocks, KV_HEADS, BLOCK, LAYOUT.token_bytes)
    cache = torch.randint(0, 256, shape, dtype=torch.uint8)
    planes = LAYOUT.planes(cache)
    for words in (planes.key_words, planes.value_words):
        # A scale near a third, and any zero-point.
        words.copy_(torch.randint(0x3500, 0x3600, words.shape, dtype=torch.int16))
    return Ours(cache, batch, _treatment(), generic.attend if name == EAGER else kv_int4.attend)


def _treatment() -> KeyTreatment:
    """One of calibrated keys."""
    shape = KV_HEADS, HEAD_SIZE
    return KeyTreatment(torch.randn(shape), torch.randn(shape).mul(0.3).exp())


def check() -> dict[str, float]:
    """Relative error of each kernel beside float32: ours over codes, vLLM's over what was given.

    Raises:
        ValueError: one is wrong.
    """
    batch, errors = make_batch(3, 1000), {}
    key, value = torch.randn(2, 3000, KV_HEADS, HEAD_SIZE, dtype=DTYPE)
    blocks = batch.block_table.long().repeat_interleave(BLOCK, 1)[:, :1000]
    slots = (blocks * BLOCK + torch.arange(1000) % BLOCK).flatten()
    query = torch.randn(3, HEADS, HEAD_SIZE, dtype=DTYPE)
    exact = _exact(query, key, value)
    memory = torch.zeros(batch.block_table.numel(), KV_HEADS, 2 * BLOCK, HEAD_SIZE, dtype=DTYPE)
    codes = torch.zeros_like(memory, dtype=torch.uint8)
    ours = random_cache(INT4, batch)
    for name, cache, most in (
        (INT4, ours, KERNEL_MAX_ERROR),
        (BF16, VLLM(memory, batch), VLLM_MAX_ERROR),
        (FP8, VLLM(codes, batch, "fp8_e4m3"), FP8_MAX_ERROR),
    ):
        cache.write(key, value, slots)
        out, want = torch.full_like(query, math.nan), exact
        cache.attend(query, out)
        if isinstance(cache, Ours):
            want = torch.empty(query.shape)
            attention = batch, LAYOUT, cache.treatment, SOFTMAX
            generic.attend(query.float(), cache.cache, want, *attention)
        errors[name] = float((out.float() - want).norm() / want.norm())
        if not errors[name] <= most:
            raise ValueError(f"{name} is off by {errors[name]:.1e}; at most {most} is right")
    return errors


def _exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Float32 attention of 3 queries to 1000 tokens each."""
    grouped = query.float().view(3, KV_HEADS, -1, HEAD_SIZE)
    keys, values = (t.float().view(3, 1000, KV_HEADS, HEAD_SIZE) for t in (key, value))
    logits = torch.einsum("bhgd,bnhd->bhgn", grouped, keys) * SOFTMAX.scale
    return torch.einsum("bhgn,bnhd->bhgd", logits.softmax(-1), values).flatten(1, 2)
