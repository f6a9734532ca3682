"""Every difference between the vLLM versions served (0.26 to 0.33), and nothing else."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import nn

from quantkit_kernels.act_quant import PER_TOKEN
from vllm_quantkit.spec import PER_CHANNEL, LayerRules, SchemeSpec, WeightSpec

REPRESENTATIVE_SIZE = 4096
"""Stands for the hidden size of a model whose config does not name one."""


def keep_every_tensor() -> Any:
    """A weight mapper that drops nothing.

    From 0.30 on, vLLM's default mapper drops `.g_idx`, so act-order checkpoints would load wrong
    without a word. Earlier versions never ask for a mapper.
    """
    from vllm.model_executor.models.utils import WeightsMapper

    return WeightsMapper()


def without_layers(mapper: Any, layers: Sequence[str]) -> Any:
    """A weight mapper that also drops every tensor of these checkpoint layers."""
    from vllm.model_executor.models.utils import WeightsMapper

    if not layers:
        return mapper
    dropped = re.compile(rf"^(?:{'|'.join(map(re.escape, layers))})\.[^.]+$")
    return mapper | WeightsMapper(orig_to_new_regex={dropped: None})


def without_tensors(mapper: Any, names: Sequence[str]) -> Any:
    """A weight mapper that also drops every layer's tensors of these names, which have dots."""
    from vllm.model_executor.models.utils import WeightsMapper

    if not names:
        return mapper
    dropped = re.compile(rf"\.(?:{'|'.join(map(re.escape, names))})$")
    return mapper | WeightsMapper(orig_to_new_regex={dropped: None})


def without_exactly(mapper: Any, names: Sequence[str]) -> Any:
    """A weight mapper that also drops the tensors of these whole names."""
    from vllm.model_executor.models.utils import WeightsMapper

    if not names:
        return mapper
    dropped = re.compile(rf"^(?:{'|'.join(map(re.escape, names))})$")
    return WeightsMapper(orig_to_new_regex={dropped: None}) | mapper


def is_moe_layer(layer: nn.Module) -> bool:
    """True for the module that holds a mixture's expert weights."""
    try:
        from vllm.model_executor.layers.fused_moe import RoutedExperts as Experts
    except ImportError:  # before the expert weights had a module of their own
        from vllm.model_executor.layers.fused_moe import FusedMoE as Experts
    return isinstance(Experts, type) and isinstance(layer, Experts)


def is_attention_layer(layer: nn.Module) -> bool:
    """True for the module that owns a layer's KV cache."""
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    return isinstance(layer, Attention | MLAAttention)


def loads_dummy_weights() -> bool:
    """True where the model being built gets random weights (`--load-format dummy`)."""
    from vllm.config import get_current_vllm_config

    return str(get_current_vllm_config().load_config.load_format) == "dummy"


def additional_config() -> Mapping[str, Any]:
    """What the user gave to `--additional-config`."""
    from vllm.config import get_current_vllm_config

    given = get_current_vllm_config().additional_config
    return given if isinstance(given, Mapping) else {}


def current_config() -> Any:
    """The `VllmConfig` of the model being built."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()


def wants_batch_invariance() -> bool:
    """True where the user asks that results do not depend on the batch (`VLLM_BATCH_INVARIANT`)."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def most_tokens() -> int:
    """Tokens of the largest batch that a layer is given; encoders of images have no such limit."""
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    if config.model_config.is_multimodal_model:
        return sys.maxsize
    return int(config.scheduler_config.max_num_batched_tokens)


def head_major_layouts() -> Any:
    """Layouts of a KV cache in which the bytes of a block and head are one piece, from 0.28 on."""
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)


def pads_cache_pages() -> bool:
    """True where layers whose pages differ in size may share a pool: from 0.28 on."""
    from vllm.v1.attention.backend import AttentionBackend

    return hasattr(AttentionBackend, "customize_spec")


def pack_cache(layer: Any, token_bytes: int) -> None:
    """Let an attention layer's cache hold so many bytes for a token's key and value in one head.

    From 0.28 on its backend says so (`customize_spec`). Before, vLLM sizes a page, and its backend
    the view of it, from the spec's head sizes: each gets half of the bytes.
    """
    if pads_cache_pages():
        return
    ask, half = layer.get_kv_cache_spec, token_bytes // 2

    def packed(vllm_config: Any) -> Any:
        spec = ask(vllm_config)
        return replace(spec, head_size=half, head_size_v=half, dtype=torch.uint8)

    layer.get_kv_cache_spec = packed


def softcap(implementation: Any) -> float:
    """The cap of an attention layer's logits, 0 for none."""
    for name in ("logits_soft_cap", "logits_softcap"):
        cap = getattr(implementation, name, None)
        if cap:
            return float(cap)
    return 0.0


def cpu_sinks(sinks: torch.Tensor) -> torch.Tensor:
    """Attention sinks as the CPU's kernel takes them: in 0.27 bfloat16, later also float32.

    Models store them in bfloat16.
    """
    if sinks.dtype == torch.bfloat16 or not pads_cache_pages():
        return sinks.bfloat16()
    return sinks.float()


def serves_lora() -> bool:
    """True where adapters may be added to layers (`--enable-lora`)."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config().lora_config is not None


def is_pipeline_parallel() -> bool:
    """True where this process holds only some of the model's layers."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().world_size > 1)


def serves(config: Mapping[str, Any], rules: LayerRules, hf_config: Any) -> bool:
    """True where this vLLM, on this platform, would serve the checkpoint itself.

    It asks vLLM's own config class, and vLLM's kernel selection for a square layer of the
    model's hidden size.
    """
    hidden = int(getattr(hf_config, "hidden_size", None) or REPRESENTATIVE_SIZE)
    dtype = getattr(hf_config, "dtype", None) or torch.bfloat16
    return _parses(str(config["quant_method"]), config) and all(
        _takes_groups(scheme) and _has_kernel(scheme.weight, (hidden, hidden), dtype)
        if scheme.is_packed
        else _has_path(scheme)
        for scheme in rules.schemes
    )


def _takes_groups(scheme: SchemeSpec) -> bool:
    """True where vLLM's method for the dialect takes the group size, whatever its kernels take."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    groups: list[int] = marlin_utils.MARLIN_SUPPORTED_GROUP_SIZES
    return scheme.dialect != "gptq" or scheme.weight.group_size in groups


def _has_path(scheme: SchemeSpec) -> bool:
    """True where a vLLM that knows the dialect has a path for the layer.

    On a CPU, 0.27 to 0.32 have W8A8 in integers, and FP8 from compressed-tensors with scales per
    channel and token; static, per-tensor and block FP8, weight-only layers and bitsandbytes fail
    there. E5M2, and INT8 weights with zero-points, fail everywhere.
    """
    from vllm.platforms import current_platform

    weight, activation = scheme.weight, scheme.activation
    if weight.code_type == "e5m2" or (weight.code_type == "int" and not weight.symmetric):
        return False
    if not current_platform.is_cpu():
        return True
    if activation is None or scheme.dialect == "bitsandbytes":
        return False
    if weight.code_type == "int":
        return True
    per_token = activation.dynamic and activation.group_size == PER_TOKEN
    per_channel = weight.group_size == PER_CHANNEL and weight.scale_rows == 1
    return scheme.dialect == "compressed-tensors" and per_channel and per_token


def _parses(quant_method: str, config: Mapping[str, Any]) -> bool:
    from vllm.model_executor.layers.quantization import get_quantization_config

    try:
        get_quantization_config(quant_method).from_config(dict(config))
    except (ValueError, NotImplementedError, AssertionError):  # it asserts W8A8 of plain int8
        return False
    return True


def _has_kernel(weight: WeightSpec, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.scalar_type import ScalarType

    # Symmetric codes carry a fixed offset; asymmetric ones carry their zero-points.
    bias = 2 ** (weight.bits - 1) if weight.symmetric else None
    fields: dict[str, Any] = {
        "full_weight_shape": shape,
        "partition_weight_shape": shape,
        "weight_type": ScalarType.uint(weight.bits, bias),
        "act_type": dtype,
        "group_size": weight.group_size,
        "zero_points": not weight.symmetric,
    }
    if "has_g_idx" in signature(MPLinearLayerConfig).parameters:  # gone in 0.30
        fields["has_g_idx"] = weight.act_order
    elif weight.act_order:
        return False
    try:
        choose_mp_linear_kernel(MPLinearLayerConfig(**fields))
    except ValueError:
        return False
    return True


def holds_prompt_logits() -> bool:
    """True in the one process of a parallel engine whose logits are listened to."""
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    return bool(get_pp_group().is_last_rank) and get_tensor_model_parallel_rank() == 0


def tap_prompt_logits(runner: Any, take: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """Let `take` see the logits, [R, V], that prompt log-probabilities are computed of.

    They come in order of the prompt's positions, if one prompt runs at a time; the newer model
    runner, which 0.32 uses on GPUs, also computes those of the token behind the prompt. What is
    returned takes `take` away again.
    """
    worker = getattr(runner, "prompt_logprobs_worker", None)
    if worker is not None:
        return _tap(worker, "compute_prompt_logprobs", lambda ask: _listening(ask, take))
    model = runner.model
    return _tap(runner, "_get_prompt_logprobs_dict", lambda ask: _overhearing(ask, model, take))


def _tap(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Let an object's method be wrapped until what is returned is called."""
    setattr(owner, name, wrap(getattr(owner, name)))
    return lambda: delattr(owner, name)


def _listening(ask: Any, take: Callable[[torch.Tensor], None]) -> Any:
    """For a method whose first argument computes logits."""

    def asked(compute: Any, *args: Any, **kwargs: Any) -> Any:
        return ask(_seen_by(take, compute), *args, **kwargs)

    return asked


def _overhearing(ask: Any, model: Any, take: Callable[[torch.Tensor], None]) -> Any:
    """For a method that lets the model compute logits."""

    def asked(*args: Any, **kwargs: Any) -> Any:
        remove = _tap(model, "compute_logits", lambda compute: _seen_by(take, compute))
        try:
            return ask(*args, **kwargs)
        finally:
            remove()

    return asked


def _seen_by(take: Callable[[torch.Tensor], None], compute: Any) -> Any:
    def computed(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = compute(hidden_states, *args, **kwargs)
        take(logits)
        return logits

    return computed
