"""Caches of 4 bits read byte by byte, and attention over them in float64: what kernels must agree
with. Neither uses the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import Batch, CacheLayout, KeyTreatment, Softmax, head_rotation

FP32_BOUND = 1e-5
"""Relative error of attention in float32: sums of some hundred products, and the rotations'."""

BF16_BOUND = 3e-3
"""The same with the output rounded to bfloat16, whose rounding alone is up to 2^-9 each."""

POISON = 0xFF
"""Of a cache's bytes: codes 15 and words that are NaN."""

NONE = KeyTreatment()
LAYOUT, SOFTMAX = CacheLayout(64, 16), Softmax(0.2)


@dataclass(frozen=True)
class Case:
    """One attention call.

    Attributes:
        layout: the cache's format.
        kv_heads, group: KV heads, and query heads of each.
        lengths: a request's (tokens, queries of this step).
        softmax: scale, window, softcap.
        treated: keys have a shift and a scale.
        sinks: heads have sinks.
        dtype: of queries, keys and values.
    """

    layout: CacheLayout = LAYOUT
    kv_heads: int = 2
    group: int = 2
    lengths: tuple[tuple[int, int], ...] = ((33, 1), (16, 1), (1, 1), (50, 4))
    softmax: Softmax = SOFTMAX
    treated: bool = True
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass
class Step:
    """Tensors of a case: everything that the ops take."""

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    cache: Tensor
    out: Tensor
    batch: Batch
    treatment: KeyTreatment
    sinks: Tensor | None
    tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each request: all its keys and values, [tokens, kv_heads, head_size]."""

    @property
    def attention(self) -> tuple[object, ...]:
        """What `attend` and `prefill` end with."""
        case = self.case
        return (
            self.cache,
            self.out,
            self.batch,
            case.layout,
            self.treatment,
            case.softmax,
            self.sinks,
        )

    def slots(self, request: int) -> Tensor:
        """Slots of all tokens of a request."""
        length, size = self.case.lengths[request][0], self.case.layout.block_size
        blocks = self.batch.block_table[request].repeat_interleave(size)[:length].long()
        return blocks * size + torch.arange(length) % size


def build(case: Case) -> Step:
    """Random tensors, a poisoned cache whose block 0 no request owns, and a poisoned output."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layout, heads = case.layout, (case.kv_heads, case.layout.head_size)
    needed = [-(-length // layout.block_size) for length, _ in case.lengths]
    order = torch.randperm(sum(needed), generator=generator) + 1
    table = torch.full((len(needed), max(needed) + 1), 1 << 30, dtype=torch.int32)
    for request, blocks in enumerate(order.split(needed)):
        table[request, : len(blocks)] = blocks
    queries = torch.tensor([0, *(q for _, q in case.lengths)]).cumsum(0).int()
    lengths = torch.tensor([length for length, _ in case.lengths]).int()
    bounds = max(q for _, q in case.lengths), int(lengths.max())
    batch = Batch(table, lengths, queries, *bounds)
    treatment = (
        KeyTreatment(normal(*heads), normal(*heads).mul(0.5).exp()) if case.treated else NONE
    )
    tokens = []
    for length, _ in case.lengths:
        key = normal(length, *heads) + (treatment.shift if case.treated else 0)
        tokens.append((key.to(case.dtype), normal(length, *heads).to(case.dtype)))
    new = [
        [pair[part][length - q :] for pair, (length, q) in zip(tokens, case.lengths, strict=True)]
        for part in (0, 1)
    ]
    query_heads = case.kv_heads * case.group
    query = normal(int(queries[-1]), query_heads, layout.head_size).to(case.dtype)
    cache = torch.full(
        (sum(needed) + 1, case.kv_heads, layout.block_size, layout.token_bytes),
        POISON,
        dtype=torch.uint8,
    )
    return Step(
        case,
        query,
        torch.cat(new[0]),
        torch.cat(new[1]),
        cache,
        torch.full_like(query, torch.nan),
        batch,
        treatment,
        normal(query_heads) if case.sinks else None,
        tokens,
    )


def read_cache(
    cache: Tensor, slots: Tensor, layout: CacheLayout
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(codes, words) of keys and of values, int64 [slots, heads, ...], byte by byte."""
    heads, half, size = cache.shape[1], layout.padded_size // 2, layout.block_size
    key_codes = torch.empty(len(slots), heads, 2 * half, dtype=torch.int64)
    value_codes = torch.empty_like(key_codes)
    key_words = torch.empty(len(slots), heads, layout.key_groups, dtype=torch.int64)
    value_words = torch.empty(len(slots), heads, layout.value_groups, dtype=torch.int64)
    for row, slot in enumerate(slots.tolist()):
        for head in range(heads):
            raw = cache[slot // size, head].flatten().numpy()
            token, at = slot % size, half * size
            low_high = raw[token * half : (token + 1) * half]
            key_codes[row, head] = torch.tensor([*(low_high & 15), *(low_high >> 4)])
            columns = at + token + size * np.arange(half)
            low_high = raw[columns] if layout.value_columns else raw[at + token * half :][:half]
            value_codes[row, head] = torch.tensor([*(low_high & 15), *(low_high >> 4)])
            words = raw[2 * at :].view("<u2")
            cut = size * layout.key_groups
            key_words[row, head] = torch.from_numpy(words[:cut][token::size].astype(np.int64))
            value_words[row, head] = torch.from_numpy(words[cut:][token::size].astype(np.int64))
    return (key_codes, key_words), (value_codes, value_words)


def decode(codes: Tensor, words: Tensor) -> Tensor:
    """value = (code - zero) * scale, float64 [..., P]."""
    bits = (words & 0xFFF0).numpy().astype(np.uint16).view(np.float16).astype(np.float64)
    scale = torch.from_numpy(bits)[..., None]
    groups = codes.unflatten(-1, (words.shape[-1], -1))
    return ((groups - (words & 15)[..., None]) * scale).flatten(-2)


def stored(step: Step, request: int) -> tuple[Tensor, Tensor]:
    """A request's keys and values as the cache has them, turned back, float64 [n, heads, D]."""
    keys, values = read_cache(step.cache, step.slots(request), step.case.layout)
    back = head_rotation(step.case.layout.head_size, torch.device("cpu")).double().T
    shift, scale = step.treatment
    key = decode(*keys) @ back * (1 if scale is None else scale.double())
    return key + (0 if shift is None else shift.double()), decode(*values) @ back


def expected(step: Step, raw: bool = False) -> Tensor:
    """Softmax attention over what the cache has, or this step's own keys and values, float64."""
    case, out = step.case, step.out.double()
    for request, (length, queries) in enumerate(case.lengths):
        if not queries:
            continue
        key, value = stored(step, request)
        if raw:
            for whole, given in zip((key, value), step.tokens[request], strict=True):
                whole[length - queries :] = given[length - queries :].double()
        start = int(step.batch.query_start[request])
        for i in range(queries):
            position = length - queries + i
            lowest = max(0, position - case.softmax.window + 1) if case.softmax.window else 0
            seen = slice(lowest, position + 1)
            q = step.query[start + i].double()
            out[start + i] = _attention(q, key[seen], value[seen], step)
    return out


def _attention(query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
    """[heads, D] of one query [heads, D] and keys and values [n, kv_heads, D]."""
    key, value = (t.repeat_interleave(step.case.group, 1) for t in (key, value))
    logits = step.case.softmax.scale * torch.einsum("hd,nhd->hn", query, key)
    if cap := step.case.softmax.softcap:
        logits = cap * torch.tanh(logits / cap)
    weight = logits.exp()
    total = weight.sum(1, keepdim=True)
    if step.sinks is not None:
        total = total + step.sinks.double().exp()[:, None]
    return torch.einsum("hn,nhd->hd", weight / total, value)


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, the largest over rows [..., D]."""
    error = (got.double() - want.double()).norm(dim=-1)
    return float((error / want.double().norm(dim=-1)).max())


def bound(dtype: torch.dtype) -> float:
    """How far attention may be from `expected`."""
    return FP32_BOUND if dtype == torch.float32 else BF16_BOUND


CASES = {
    **{f"D{size}": Case(CacheLayout(size, 32)) for size in (64, 80, 96, 112, 128, 192, 256)},
    **{f"G{group}": Case(group=group) for group in (1, 4, 7, 8, 16)},
    "columns": Case(CacheLayout(80, 16, value_columns=True)),
    "wide keys": Case(CacheLayout(128, 16, key_group=64, value_group=32)),
    "long": Case(lengths=((700, 1), (513, 2))),
    "untreated": Case(treated=False),
    "window": Case(softmax=Softmax(0.2, window=9)),
    "window 1": Case(softmax=Softmax(0.2, window=1)),
    "softcap": Case(softmax=Softmax(0.3, softcap=2.0)),
    "sinks": Case(sinks=True),
    "all": Case(CacheLayout(128, 16), 3, 4, softmax=Softmax(0.2, 17, 3.0), sinks=True),
    "drafts": Case(lengths=((8, 8), (40, 5), (17, 3)), softmax=Softmax(0.2, window=4)),
    "bf16": Case(CacheLayout(128, 64), dtype=torch.bfloat16),
    "bf16 all": Case(
        CacheLayout(256, 16), softmax=Softmax(0.1, 17, 3.0), sinks=True, dtype=torch.bfloat16
    ),
    "fp16": Case(CacheLayout(96, 16), dtype=torch.float16),
}
"""Name to case: every head size, group, option and dtype at least once."""
