"""A layer's attention over an INT4 cache, without an engine: against the kernels' reference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit_kernels.kv_int4 import Batch, KeyTreatment, Softmax, reference
from vllm_quantkit.integration import kv_cpu, kv_cuda, kv_prompts
from vllm_quantkit.integration.kv_backend import (
    SCALE,
    SHIFT,
    Groups,
    LayerAttention,
)
from vllm_quantkit.integration.kv_cpu import Int4CPUImpl, Int4CPUMetadata
from vllm_quantkit.integration.kv_cuda import Int4CUDABuilder, Int4CUDAImpl
from vllm_quantkit.integration.kv_devices import backend_class
from vllm_quantkit.integration.kv_prompts import PromptStep, Scratch

BLOCK, BLOCKS = 32, 64

TOLERANCE = 2e-5
"""Largest |difference| of outputs near 1: both sides in float32, sums in another order."""

REQUESTS = [(40, 200), (1, 77), (70, 70), (4, 90), (5, 5), (33, 33), (0, 0)]
"""Queries and tokens: with context, decoding, whole, drafts, short and whole, another, padding."""


PLAIN = Softmax(0.2)


@dataclass
class Case:
    """Attributes:
    head: its dimensions.
    softmax: window and cap.
    heads: of queries and keys.
    shifted: keys have a mean that is taken off, and a scale.
    sinks: there are some.
    """

    head: int = 64
    softmax: Softmax = PLAIN
    heads: tuple[int, int] = (4, 2)
    shifted: bool = True
    sinks: bool = False
    cached: bool = False
    requests: list[tuple[int, int]] = field(default_factory=lambda: REQUESTS)


class Run:
    """A step's tensors, its cache filled, and what the reference makes of them."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, (heads, kv_heads), size = case, case.heads, case.head
        mean = 3 * torch.randn(kv_heads, size)
        scale = torch.exp2(torch.randn(kv_heads, size).clamp(-1, 1))
        self.treatment = KeyTreatment(mean, scale) if case.shifted else KeyTreatment()
        self.sinks = torch.randn(heads).bfloat16().float() if case.sinks else None
        self.attention = LayerAttention(
            heads, kv_heads, size, case.softmax, Groups(32, 64), case.cached, self.sinks
        )
        self.layout = self.attention.groups.layout(size, BLOCK, columns=False)
        # Stale bytes may be anything, NaN too.
        shape = BLOCKS, kv_heads, BLOCK, self.layout.token_bytes
        self.cache = torch.full(shape, 0xFF, dtype=torch.uint8)
        lengths = torch.tensor([queries for queries, _ in case.requests])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        tokens = int(starts[-1])
        self.query = torch.randn(tokens, heads, size)
        self.key = torch.randn(tokens, kv_heads, size) + mean
        self.value = torch.randn(tokens, kv_heads, size)
        table = torch.randperm(BLOCKS)[: 7 * len(lengths)].view(len(lengths), 7).int()
        seq_lens = torch.tensor([stop for _, stop in case.requests], dtype=torch.int32)
        self.batch = Batch(table, seq_lens, starts, int(lengths.max()), int(seq_lens.max()))
        self._fill(mean)

    def _fill(self, mean: Tensor) -> None:
        """Contexts of random tokens, and the step's own."""
        kv_heads, size = self.case.heads[1], self.case.head
        for request, (queries, stop) in enumerate(self.case.requests):
            context = stop - queries
            rows = slice(*self.batch.query_start[request : request + 2].tolist())
            keys = torch.cat([torch.randn(context, kv_heads, size) + mean, self.key[rows]])
            values = torch.cat([torch.randn(context, kv_heads, size), self.value[rows]])
            position = torch.arange(stop)
            blocks = self.batch.block_table[request, position // BLOCK].long()
            slots = blocks * BLOCK + position % BLOCK
            reference.write(keys, values, self.cache, slots, self.layout, self.treatment)

    def expected(self, *, raw: bool) -> Tensor:
        out = torch.zeros_like(self.query)
        tail = self.batch, self.layout, self.treatment, self.case.softmax, self.sinks
        reference.prefill(self.query, self.key, self.value, self.cache, out, *tail, raw=raw)
        return out

    def found(self, cls: type = Int4CPUImpl) -> Tensor:
        layer = nn.Module()
        layer.register_buffer(SHIFT, self.treatment.shift)
        layer.register_buffer(SCALE, self.treatment.scale)
        out = torch.full_like(self.query, torch.nan)
        metadata = Int4CPUMetadata(
            self.batch,
            len(self.query),
            self.batch.query_start.tolist(),
            self.batch.seq_lens.tolist(),
            PromptStep(self.batch.block_table, Scratch()),
        )
        rows = self.query, self.key, self.value
        cls(self.attention).forward(layer, *rows, self.cache, metadata, out)
        return out

    def check(self) -> None:
        """Few queries with a context read the cache; the others, keys and values as they are."""
        raw, cached, found = self.expected(raw=True), self.expected(raw=False), self.found()
        for request, (queries, stop) in enumerate(self.case.requests):
            rows = slice(*self.batch.query_start[request : request + 2].tolist())
            reads_cache = self.case.cached or queries == 1 or (queries <= 8 and queries < stop)
            expected = (cached if reads_cache else raw)[rows]
            torch.testing.assert_close(found[rows], expected, rtol=0, atol=TOLERANCE)


CASES = {
    "plain": Case(shifted=False),
    "shifted": Case(),
    "window": Case(softmax=Softmax(0.2, window=50)),
    "cap": Case(softmax=Softmax(0.2, softcap=5.0)),
    "sinks": Case(sinks=True),
    "all": Case(head=96, softmax=Softmax(0.2, 50, 5.0), sinks=True),
    "48": Case(head=48),
    "80, one KV head": Case(head=80, heads=(4, 1)),
    "112, each its own": Case(head=112, heads=(3, 3)),
    "256": Case(head=256, heads=(8, 1), softmax=Softmax(0.06)),
    "all from the cache": Case(cached=True),
    "all from the cache, window": Case(cached=True, softmax=Softmax(0.2, window=50)),
}


@pytest.mark.parametrize("case", CASES)
def test_mixed_batches(case):
    Run(CASES[case]).check()


def test_little_memory_means_more_passes_not_other_results(monkeypatch):
    """One KV head of one request at a time, 16 tokens dequantised at a time."""
    monkeypatch.setattr(kv_prompts, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(kv_prompts, "GATHERED", 16)
    monkeypatch.setattr(kv_cpu, "READ_BYTES", 1)
    Run(CASES["all"]).check()
    Run(CASES["all from the cache"]).check()


def test_read_from_the_cache_results_do_not_depend_on_how_a_prompt_was_cut():
    whole = Run(Case(cached=True, requests=[(100, 100)]))
    expected = whole.found()
    rows = slice(60, 100)
    later = Run(Case(cached=True, requests=[(100, 100)]))
    later.query = later.query[rows]
    later.batch = later.batch._replace(
        query_start=torch.tensor([0, 40], dtype=torch.int32), max_query_len=40
    )
    assert torch.equal(later.found(), expected[rows])


def test_scratch_does_not_grow_with_the_context_beyond_one_head():
    attention = Run(Case()).attention
    scratch = Scratch()
    capacity = scratch.tokens(attention, torch.float32)
    assert capacity * 2 * 2 * 64 * 4 == kv_prompts.SCRATCH_BYTES
    long = SimpleNamespace(blocks=lambda size: 10**6 // size)
    assert scratch.heads(long, attention, 64, torch.float32) == 1


class Calls:
    """Stands for an op and remembers what it was given."""

    def __init__(self) -> None:
        self.made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.made.append((args, kwargs))


@pytest.fixture
def gpu_ops(monkeypatch) -> tuple[Calls, Calls]:
    attend, prefill = Calls(), Calls()
    monkeypatch.setattr(kv_cuda, "attend", attend)
    monkeypatch.setattr(kv_cuda, "prefill", prefill)
    return attend, prefill


def gpu_builder(drafts: int | None = None) -> Int4CUDABuilder:
    speculative = None
    if drafts is not None:
        speculative = SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
    config = SimpleNamespace(
        speculative_config=speculative,
        use_v2_model_runner=False,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        compilation_config=SimpleNamespace(static_forward_context={"layer": nn.Module()}),
    )
    return Int4CUDABuilder(None, ["layer"], config, torch.device("cpu"))


def common(run: Run, **changes: Any) -> SimpleNamespace:
    """What vLLM tells a builder; its tensors refuse to be read on the host."""
    fields = {
        "query_start_loc": run.batch.query_start,
        "seq_lens": run.batch.seq_lens,
        "block_table_tensor": run.batch.block_table,
        "slot_mapping": torch.arange(len(run.query)),
        "max_query_len": run.batch.max_query_len,
        "max_seq_len": run.batch.max_seq_len,
        "num_actual_tokens": len(run.query),
        "causal": True,
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("drafts", "longest", "decodes"),
    [(None, 1, True), (None, 2, False), (3, 4, True), (3, 5, False)],
)
def test_gpus_decode_with_one_op_and_prefill_with_another(drafts, longest, decodes, gpu_ops):
    run, (attend, prefill) = Run(Case(sinks=True)), gpu_ops
    metadata = gpu_builder(drafts).build(0, common(run, max_query_len=longest))
    assert metadata.batch.block_table is run.batch.block_table
    impl = Int4CUDAImpl(run.attention)
    layer, out = nn.Module(), torch.empty_like(run.query)

    impl.forward(layer, run.query, run.key, run.value, run.cache, metadata, out)

    assert (len(attend.made), len(prefill.made)) == ((1, 0) if decodes else (0, 1))
    (args, kwargs) = (attend if decodes else prefill).made[0]
    layout = next(arg for arg in args if isinstance(arg, type(run.layout)))
    assert layout == replace(run.layout, value_columns=True)
    assert kwargs == ({} if decodes else {"raw": True})
    assert torch.equal(args[-1], run.sinks)


def test_gpus_read_a_shared_cache_without_keys(gpu_ops):
    run, (_, prefill) = Run(Case(cached=True)), gpu_ops
    metadata = gpu_builder().build(0, common(run))

    Int4CUDAImpl(run.attention).forward(
        nn.Module(), run.query, None, None, run.cache, metadata, torch.empty_like(run.query)
    )

    (args, kwargs) = prefill.made[0]
    assert args[1].shape == run.key.shape
    assert kwargs == {"raw": False}


def test_gpu_graphs_are_for_uniform_batches_and_metadata_may_change_its_blocks():
    builder, run = gpu_builder(2), Run(Case())
    assert builder.get_cudagraph_support(None, None).name == "UNIFORM_BATCH"
    metadata = builder.build(0, common(run))
    table, slots = run.batch.block_table + 1, torch.arange(3)

    moved = builder.update_block_table(metadata, table, slots)

    assert moved.batch.block_table is table
    assert moved.slot_mapping is slots
    assert moved.batch.seq_lens is metadata.batch.seq_lens


def test_vllm_measuring_memory_leaves_the_output_alone():
    run = Run(Case())
    out = torch.zeros_like(run.query)
    impl = Int4CPUImpl(run.attention)
    assert impl.forward(nn.Module(), run.query, run.key, run.value, run.cache, None, out) is out
    assert not out.any()


def test_a_backend_for_each_format_and_device():
    cpu, gpu = (backend_class(kind, Groups(32, 64)) for kind in ("cpu", "cuda"))
    assert cpu is backend_class("cpu", Groups(32, 64))
    assert len({cpu.full_cls_name(), gpu.full_cls_name()}) == 2
    assert backend_class("cpu", Groups(64, 64)).full_cls_name() != cpu.full_cls_name()
    assert gpu.get_supported_kernel_block_sizes() == [128, 64]
    assert gpu.get_preferred_block_size(16) == 128
    assert gpu.get_preferred_block_size(64) == 64
    (multiple,) = cpu.get_supported_kernel_block_sizes()
    assert multiple.base == 32
    assert gpu.get_kv_cache_shape(10, 128, 8, 70) == (10, 8, 128, 140)
    assert Groups(32, 64).token_bytes(128) == 140
