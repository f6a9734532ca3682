"""Memory that a model takes on a device, and the tokens that fit beside it."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_quantkit.footprint.facts import LayerGroup, Model, ModelFacts
from vllm_quantkit.footprint.groups import NO_OPTIONS, group_layers, scheme_rules
from vllm_quantkit.footprint.kv_cache import KVCache, kv_cache_for
from vllm_quantkit.footprint.layers import linear_layers
from vllm_quantkit.footprint.merging import check_heads
from vllm_quantkit.footprint.running import (
    DEFAULT_WORKLOAD,
    Workload,
    activation_bytes,
    free_bytes,
    overhead_bytes,
)
from vllm_quantkit.footprint.weights import WeightBytes, weight_bytes
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.options import Options
from vllm_quantkit.spec import Frozen


class Footprint(Frozen):
    """Bytes on each tensor-parallel rank.

    Attributes:
        weight_bytes: all weights and buffers, loaded and packed.
        weight_bytes_16bit: the same with every layer in 16 bits.
        linear_bytes: of `weight_bytes`, the linear layers of the blocks.
        head_bytes: the output head; 0 where it is the embedding.
        other_bytes: embeddings, norms, biases, tables of positions.
        kv_bytes_per_token: over all layers.
        activation_bytes: of the largest step.
        overhead_bytes: runtime, libraries and CUDA graphs.
        free_for_cache: what is left for the KV cache; negative where the rest does not fit.
        cache_tokens: tokens that fit there.
        sequences: of `max_model_len` tokens.
        max_model_len: that length.
        notes: what these numbers leave out or assume, a sentence each.
    """

    weight_bytes: int
    weight_bytes_16bit: int
    linear_bytes: int
    head_bytes: int
    other_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int
    overhead_bytes: int
    free_for_cache: int
    cache_tokens: int
    sequences: float
    max_model_len: int
    notes: tuple[str, ...] = ()


def footprint(
    model: Model,
    *,
    method: str | None,
    device: Device,
    kv: KVCache | None = None,
    options: Options = NO_OPTIONS,
    tp: int = 1,
    workload: Workload = DEFAULT_WORKLOAD,
) -> Footprint:
    """What the model takes on each rank of `tp` such devices.

    Args:
        model: any.
        method: as in `layer_groups`.
        device: each rank has one; ranks on CPUs share the memory.
        kv: how keys and values are stored; None for what method and options say.
        options: of `--additional-config`.
        tp: tensor-parallel size.
        workload: what the engine is started for.

    Raises:
        QuantkitError: as `layer_groups` and `packed_bytes`.
    """
    check_heads(model.facts, tp)
    dtype = workload.activation_dtype(model.facts)
    layers = linear_layers(model, scheme_rules(model, method, options))
    groups = group_layers(model, layers, method, tp)
    in_tree = method is None

    def weigh(chosen: tuple[LayerGroup, ...]) -> WeightBytes:
        return weight_bytes(model, chosen, layers, device, tp=tp, dtype=dtype, in_tree=in_tree)

    weights, sixteen = weigh(groups), weigh(tuple(map(in_16_bits, groups)))
    kv = kv or kv_cache_for(method, options)
    token = kv.token_bytes(model.facts, tp, dtype)
    activations = activation_bytes(model.facts, device, workload, tp)
    overhead = overhead_bytes(device, workload, tp)
    free = free_bytes(device, workload, tp, weights.total + activations + overhead)
    length = workload.max_model_len or model.facts.max_position or 1
    step, _ = workload.batch(device, tp)
    # A model without attention keeps nothing that grows.
    sequences = max(0, free) / max(1, kv.sequence_bytes(model.facts, length, step, tp, dtype))
    return Footprint(
        weight_bytes=weights.total,
        weight_bytes_16bit=sixteen.total,
        linear_bytes=weights.linear,
        head_bytes=weights.head,
        other_bytes=weights.total - weights.linear - weights.head,
        kv_bytes_per_token=token,
        activation_bytes=activations,
        overhead_bytes=overhead,
        free_for_cache=free,
        cache_tokens=int(sequences * length),
        sequences=sequences,
        max_model_len=length,
        notes=tuple(notes(model.facts, groups, device, in_tree=in_tree)),
    )


def in_16_bits(group: LayerGroup) -> LayerGroup:
    """The group with its layers left in 16 bits."""
    return group.model_copy(update={"spec": None})


def notes(
    facts: ModelFacts, groups: tuple[LayerGroup, ...], device: Device, *, in_tree: bool
) -> Iterator[str]:
    """What the numbers leave out or assume."""
    if in_tree and any(group.spec is not None for group in groups):
        yield "quantised layers are counted as stored: vLLM's own kernels may pad them a little"
    if facts.windowed_layers:
        yield (
            f"{facts.windowed_layers} of {facts.num_layers} layers see {facts.sliding_window} "
            "tokens: longer sequences take less than all layers' bytes a token"
        )
    if facts.attention_layers < facts.num_layers:
        yield (
            f"{facts.num_layers - facts.attention_layers} layers keep no keys and values of their "
            "own; what recurrent ones keep for each sequence is not counted"
        )
    if device.kind == "cpu":
        yield "on CPUs vLLM keeps a packed copy of 16-bit embeddings and heads beside the original"
    if not facts.from_headers:
        yield "tensors are told from config.json alone: no safetensors file could be read"
