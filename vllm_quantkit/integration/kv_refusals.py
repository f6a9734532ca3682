"""What an INT4 cache does not serve, one sentence each, asked of vLLM's own objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from vllm_quantkit import kv_rules
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.kv_rules import DROP, AttentionFacts, check_attention, check_recurrent
from vllm_quantkit.options import KVCacheOptions


def check_cache_dtype(dtype: str, options: KVCacheOptions, method: str, *, int4: bool) -> None:
    """`kv_rules.check_cache_dtype` on this platform.

    Raises:
        ConfigError, UnsupportedScheme: as it.
    """
    cpu = current_platform.is_cpu()
    kv_rules.check_cache_dtype(dtype, options, method, int4=int4, cpu=cpu)


def check_engine(config: Any) -> None:
    """The engine runs nothing that would misread an INT4 cache.

    Raises:
        UnsupportedScheme: it does.
    """
    check_recurrent(hybrid=bool(getattr(config.model_config, "is_hybrid", False)))
    for found, where, fix in _engine_faults(config):
        if found:
            raise kv_rules.not_served(where, fix)


def _engine_faults(config: Any) -> Iterator[tuple[bool, str, str]]:
    parallel = config.parallel_config
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
    check_attention(_facts(layer, prefix))


def _facts(layer: Any, prefix: str) -> AttentionFacts:
    kind = type(layer)
    if not isinstance(layer, Attention):
        return AttentionFacts(name=prefix, kind=kind.__name__, latent=True)
    decoder = layer.attn_type == AttentionType.DECODER
    return AttentionFacts(
        name=prefix,
        kind=kind.__name__,
        plain=kind is Attention,
        role="decoder" if decoder else str(layer.attn_type),
        alibi=getattr(layer.impl, "alibi_slopes", None) is not None,
        head_size=layer.head_size,
        value_size=layer.head_size_v,
        sees_images=bool(layer.use_mm_prefix),
    )


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
