"""What an INT4 cache does not serve, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from quantkit_kernels.kv_int4.layout import LARGEST_HEAD
from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.options import KVCacheOptions

INT4 = "int4_per_token_head"
"""The word of `--kv-cache-dtype` that selects quantkit's cache."""

SERVED_ON_CPU = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", INT4)
"""Words whose cache a CPU reads as it was written."""

DROP = "serve this model without an INT4 KV cache"


def check_cache_dtype(dtype: str, options: KVCacheOptions, method: str, *, int4: bool) -> None:
    """`--kv-cache-dtype` contradicts neither the method and options nor the platform.

    Args:
        dtype: the user's word.
        options: the user's.
        method: the name given to `--quantization`.
        int4: True where the method's own cache is INT4.

    Raises:
        ConfigError: two of them ask for different caches.
        UnsupportedScheme: vLLM's CPU attention would misread such a cache.
    """
    if int4 or options.dtype == "int4":
        asked = f"--quantization {method}" if int4 else "kv_cache.dtype = 'int4'"
        if dtype not in ("auto", INT4):
            raise ConfigError(
                f"--kv-cache-dtype {dtype} contradicts {asked}, whose KV cache is INT4; "
                f"drop one of them."
            )
    elif dtype != INT4:
        _check_unused(dtype, options)
    if current_platform.is_cpu() and dtype not in SERVED_ON_CPU:
        raise UnsupportedScheme(
            f"--kv-cache-dtype {dtype} is not served on CPUs, where vLLM would store 16 bits and "
            f"read something else; use {INT4}, fp8 or auto."
        )


def _check_unused(dtype: str, options: KVCacheOptions) -> None:
    """No option is set that only means something to an INT4 cache, or to a quantised one."""
    given = {name: getattr(options, name) for name in options.model_fields_set - {"dtype"}}
    if dtype in ("fp8", "fp8_e4m3"):
        given.pop("calibration", None)
    for name, value in given.items():
        raise ConfigError(
            f"--additional-config quantkit: kv_cache.{name} = {str(value)!r} means nothing to a "
            f"KV cache of --kv-cache-dtype {dtype}; add --kv-cache-dtype {INT4}, or remove it."
        )


def check_engine(config: Any) -> None:
    """The engine runs nothing that would misread an INT4 cache.

    Raises:
        UnsupportedScheme: it does.
    """
    for found, what, fix in _engine_faults(config):
        if found:
            raise UnsupportedScheme(f"an INT4 KV cache is not served {what}; {fix}, or {DROP}.")


def _engine_faults(config: Any) -> Iterator[tuple[bool, str, str]]:
    parallel, model = config.parallel_config, config.model_config
    dcp = parallel.decode_context_parallel_size
    yield dcp > 1, f"with decode_context_parallel_size = {dcp}", "set it to 1"
    pcp = getattr(parallel, "prefill_context_parallel_size", 1)
    yield pcp > 1, f"with prefill_context_parallel_size = {pcp}", "set it to 1"
    transfer = config.kv_transfer_config
    name = getattr(transfer, "kv_connector", None)
    yield (
        transfer is not None and name is not None,
        f"with the KV connector {name}, which may read its bytes as keys and values",
        "start without --kv-transfer-config and KV offloading",
    )
    fast = getattr(config.cache_config, "kv_sharing_fast_prefill", False)
    yield bool(fast), "with --kv-sharing-fast-prefill", "drop the flag"
    yield (
        bool(getattr(model, "is_hybrid", False)),
        "for models that also have recurrent layers",
        "use the 16-bit cache",
    )
    platform = current_platform
    yield (
        not (platform.is_cpu() or platform.is_cuda_alike()),
        f"on {platform.device_type}",
        "use a CPU or a CUDA device",
    )


def check_layer(layer: nn.Module, prefix: str) -> None:
    """An attention layer's keys and values fit an INT4 cache.

    Raises:
        UnsupportedScheme: they do not.
    """
    for found, what in _layer_faults(layer):
        if found:
            raise UnsupportedScheme(
                f"an INT4 KV cache is not served for {prefix}, which {what}; {DROP}."
            )


def _layer_faults(layer: Any) -> Iterator[tuple[bool, str]]:
    kind = type(layer)
    yield not isinstance(layer, Attention), f"is a {kind.__name__} (latent attention, MLA)"
    yield (
        layer.attn_type != AttentionType.DECODER,
        f"is {layer.attn_type} attention (encoders and cross attention keep no INT4 cache)",
    )
    yield kind is not Attention, f"is a {kind.__name__}"
    yield getattr(layer.impl, "alibi_slopes", None) is not None, "uses ALiBi"
    yield (
        layer.head_size_v != layer.head_size,
        f"has keys of {layer.head_size} and values of {layer.head_size_v} dimensions",
    )
    yield (
        layer.head_size > LARGEST_HEAD,
        f"has heads of {layer.head_size} dimensions, more than {LARGEST_HEAD}",
    )
    yield bool(layer.use_mm_prefix), "attends to images in both directions"


def check_causal(causal: Any, layers: Sequence[str]) -> None:
    """A step is causal.

    Raises:
        UnsupportedScheme: it is not.
    """
    if causal is not True:
        raise UnsupportedScheme(
            f"{layers[0]} is asked for attention that is not causal, which an INT4 KV cache does "
            f"not serve; {DROP}."
        )
