"""Memory of a running engine besides weights: activations, the runtime, and what is left to cache.

vLLM measures these when it starts: it runs the largest step, and gives the rest of its share of
the memory to the KV cache (https://docs.vllm.ai/en/latest/configuration/conserving_memory.html).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vllm_quantkit.footprint.facts import ModelFacts
from vllm_quantkit.footprint.kv_cache import ITEM_BYTES
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.spec import Frozen

GIB = 1 << 30

LOGITS_COPIES = 3
"""float32 tensors of [sequences, vocabulary] while vLLM's sampler runs: the logits, what top-k and
top-p sort, and probabilities."""

HIDDEN_COPIES = 3
"""Tensors of [tokens, hidden] at a time: the residual, the normed input, and a layer's output."""

GATED = 3
"""Widths of a gated MLP's hidden layer at a time: gate, up, and their product."""

CONTEXT_BYTES = int(0.6 * GIB)
"""An allowance for a CUDA context, cuBLAS's workspace and loaded kernels; not measured."""

GRAPH_BYTES = int(0.5 * GIB)
"""An allowance for CUDA graphs of all batch sizes, which share one pool; not measured."""

PARALLEL_BYTES = int(0.5 * GIB)
"""An allowance for buffers of NCCL and of vLLM's all-reduce on each rank; not measured."""

CPU_PROCESS_BYTES = int(1.0 * GIB)
"""Python, PyTorch and vLLM in a worker's process: with vLLM 0.32 imported it has 0.6 GiB, and the
rest is an allowance for what it makes while it runs."""


class Workload(Frozen):
    """What an engine is started for; None takes vLLM's default.

    Attributes:
        max_model_len: longest sequence; the model's own.
        max_num_seqs: sequences at a time.
        max_num_batched_tokens: tokens of a step.
        dtype: of the activations; `auto` for the model's, but 16 bits for a model in 32.
        memory_utilization: share of a device's memory that the engine takes
            (`--gpu-memory-utilization`, on CPUs too).
        cache_bytes: size of the KV cache where it is given (`--kv-cache-memory-bytes`, and
            `VLLM_CPU_KVCACHE_SPACE` on a CPU).
        enforce_eager: True without CUDA graphs.
    """

    max_model_len: int | None = Field(default=None, gt=0)
    max_num_seqs: int | None = Field(default=None, gt=0)
    max_num_batched_tokens: int | None = Field(default=None, gt=0)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    memory_utilization: float = Field(default=0.92, gt=0, le=1)
    cache_bytes: int | None = Field(default=None, gt=0)
    enforce_eager: bool = False

    def activation_dtype(self, facts: ModelFacts) -> str:
        """The dtype of what is not quantised."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if facts.dtype == "float32" else facts.dtype

    def batch(self, device: Device, tp: int) -> tuple[int, int]:
        """Tokens of a step, and sequences at a time; as `vllm serve` chooses them by the device."""
        tokens, sequences = default_batch(device, tp)
        return self.max_num_batched_tokens or tokens, self.max_num_seqs or sequences


DEFAULT_WORKLOAD = Workload()


def default_batch(device: Device, tp: int) -> tuple[int, int]:
    """vLLM's `max_num_batched_tokens` and `max_num_seqs` for a server.

    https://github.com/vllm-project/vllm/blob/main/vllm/engine/arg_utils.py (get_batch_defaults)
    """
    if device.kind != "cuda":
        return 2048 * tp, 128 * tp
    if device.memory_bytes >= 160 * GIB:
        return 16384, 1024
    if device.memory_bytes >= 70 * GIB and "a100" not in device.name.lower():
        return 8192, 1024
    return 2048, 256


def activation_bytes(facts: ModelFacts, device: Device, workload: Workload, tp: int) -> int:
    """Bytes of the largest step: hidden states and one MLP's inside, then the logits."""
    tokens, sequences = workload.batch(device, tp)
    item = ITEM_BYTES[workload.activation_dtype(facts)]
    inside = GATED * facts.intermediate_size // tp
    attention = (facts.heads + 2 * facts.kv_heads) * facts.head_dim // tp
    layer = tokens * (HIDDEN_COPIES * facts.hidden_size + max(inside, attention)) * item
    logits = LOGITS_COPIES * min(sequences, tokens) * facts.vocab_size * 4
    return max(layer, logits + tokens * facts.hidden_size * item)


def overhead_bytes(device: Device, workload: Workload, tp: int) -> int:
    """What a rank takes before a model is loaded, and CUDA graphs."""
    if device.kind != "cuda":
        return CPU_PROCESS_BYTES
    graphs = 0 if workload.enforce_eager else GRAPH_BYTES
    return CONTEXT_BYTES + graphs + (PARALLEL_BYTES if tp > 1 else 0)


def free_bytes(device: Device, workload: Workload, tp: int, taken: int) -> int:
    """Bytes left to a rank's KV cache; a given size is taken as it is.

    On CPUs every rank counts the whole memory as its own, if vLLM is not told otherwise: ranks
    here share it.
    """
    if workload.cache_bytes is not None:
        return workload.cache_bytes
    ranks = 1 if device.kind == "cuda" else tp
    return int(device.memory_bytes * workload.memory_utilization / ranks) - taken
