"""What a KV cache will be, and what an INT4 one does not serve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_quantkit.check.release import Release
from vllm_quantkit.check.report import CacheCheck
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.footprint import KVCache, Model, ModelFacts, kv_cache_for
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.kv_calibration import FOLDER, read_kv_calibration
from vllm_quantkit.kv_rules import (
    INT4,
    AttentionFacts,
    check_attention,
    check_cache_dtype,
    check_pool,
    check_recurrent,
)
from vllm_quantkit.options import KVCacheOptions, Options
from vllm_quantkit.schemes import Method
from vllm_quantkit.spec import Frozen

STORED = {"auto": "in {dtype}", "fp8": "in 8-bit floats", "int4": "in 4 bits"}
"""A cache's number in words."""

PADDING = Release(0, 28)
"""The release from which vLLM pads smaller pages of a cache to the size of larger ones."""

RECURRENT = ("mamba", "jamba", "bamba", "zamba", "falcon_h1", "granitemoehybrid", "nemotron_h")
"""Beginnings of `model_type` of families with recurrent layers."""

RECURRENT_LAYERS = {"linear_attention", "mamba", "mamba2", "conv", "recurrent"}
"""Kinds of layers (`layer_types`) that keep a state instead of keys and values."""


class ServedCache(Frozen):
    """A cache, and what serves it.

    Attributes:
        kv: how keys and values are stored.
        backend: what writes and reads them.
        reason: why that one.
    """

    kv: KVCache
    backend: str
    reason: str

    def told(self, facts: ModelFacts, ranks: int, dtype: str) -> CacheCheck:
        """In the report's words.

        Args:
            facts: of the model.
            ranks: that share its heads.
            dtype: of activations.
        """
        return CacheCheck(
            stored=STORED[self.kv.dtype].format(dtype=dtype),
            backend=self.backend,
            reason=self.reason,
            bytes_per_token=self.kv.token_bytes(facts, ranks, dtype),
        )


def served_cache(
    model: Model,
    method: type[Method] | None,
    options: Options,
    dtype: str,
    device: Device,
    release: Release,
) -> ServedCache:
    """The KV cache that the words for it make.

    Args:
        model: any.
        method: behind `--quantization`; None where vLLM serves the model itself.
        options: of `--additional-config`.
        dtype: `--kv-cache-dtype`.
        device: where.
        release: of vLLM.

    Raises:
        ConfigError, UnsupportedScheme: the words contradict each other, or such a cache is not
            served.
        CheckpointError: a calibration cannot be read, or is of another model.
    """
    name = None if method is None else method.name
    int4 = method is not None and method.int4_cache
    cpu = device.kind == "cpu"
    check_cache_dtype(dtype, options.kv_cache, name or "", int4=int4, cpu=cpu)
    kv = kv_cache_for(name, options, dtype)
    if method is None or not (int4 or options.kv_cache.dtype == "int4" or dtype == INT4):
        return ServedCache(kv=kv, backend=_vllms_backend(model.facts, cpu), reason=_reason(dtype))
    check_recurrent(hybrid=is_recurrent(model.config))
    check_attention(attention_facts(model))
    kept = kept_layers(model, options.kv_cache)
    windows = 0 < model.facts.windowed_layers < model.facts.num_layers
    shown = ", ".join(f"layer {number}" for number in kept)
    check_pool(shown, mixed_windows=windows, pads_pages=release >= PADDING)
    return ServedCache(
        kv=kv.model_copy(update={"skip_layers": kept}),
        backend="QUANTKIT_INT4 (CPU loops)" if cpu else "QUANTKIT_INT4 (Triton)",
        reason=_int4_reason(name or "", options.kv_cache, dtype, int4),
    )


def attention_facts(model: Model) -> AttentionFacts:
    """The model's attention as an INT4 cache sees it."""
    facts, config = model.facts, model.config
    return AttentionFacts(
        name="model.layers.0.self_attn.attn",
        kind="MLAAttention" if facts.mla else "Attention",
        latent=facts.mla,
        role="encoder_decoder" if config.get("is_encoder_decoder") else "decoder",
        alibi=_uses_alibi(config),
        head_size=facts.head_dim,
        value_size=facts.value_dim,
    )


def is_recurrent(config: Mapping[str, Any]) -> bool:
    """True for models that also keep recurrent states."""
    kinds = set(config.get("layer_types") or ()) | set(config.get("layers_block_type") or ())
    family = str(config.get("model_type", ""))
    return bool(kinds & RECURRENT_LAYERS) or family.startswith(RECURRENT)


def kept_layers(model: Model, options: KVCacheOptions) -> tuple[int, ...]:
    """Numbers of the layers that keep 16 bits: the user's, and those a calibration names.

    Raises:
        CheckpointError: the calibration cannot be read, or is of another model.
    """
    folder = options.calibration or _beside(model)
    if folder is None:
        return tuple(sorted(set(options.skip_layers)))
    layers = read_kv_calibration(folder).layers
    numbers = {_number(name): layer.dtype for name, layer in layers.items()}
    missing = sorted(set(range(model.facts.num_layers)) - numbers.keys())
    if missing:
        raise CheckpointError(
            f"{folder} has no layer {missing[0]}, but {', '.join(list(layers)[:3])} ...: it was "
            f"made of another model. Calibrate this one: quantkit calibrate-kv MODEL "
            f"--calibration TEXT --out FOLDER."
        )
    kept = {number for number, stored in numbers.items() if stored == "auto"}
    return tuple(sorted(kept | set(options.skip_layers)))


def _beside(model: Model) -> Path | None:
    """The calibration inside a model's folder."""
    folder = Path(model.facts.model) / FOLDER
    return folder if folder.is_dir() else None


def _number(module: str) -> int:
    """Of the block that a module belongs to; -1 for none."""
    return next((int(part) for part in module.split(".") if part.isdigit()), -1)


def _uses_alibi(config: Mapping[str, Any]) -> bool:
    attention = config.get("attn_config")
    inner = attention.get("alibi") if isinstance(attention, Mapping) else None
    return bool(config.get("alibi") or inner) or config.get("model_type") == "bloom"


def _vllms_backend(facts: ModelFacts, cpu: bool) -> str:
    if not cpu:
        return "vLLM's own, chosen when it starts"
    return "CPU_MLA" if facts.mla else "CPU_ATTN"


def _reason(dtype: str) -> str:
    if dtype == "auto":
        return "nothing asks for another; keys and values keep the model's dtype"
    return f"--kv-cache-dtype {dtype} is vLLM's own"


def _int4_reason(method: str, options: KVCacheOptions, dtype: str, int4: bool) -> str:
    if int4:
        return f"--quantization {method} asks for it"
    if options.dtype == "int4":
        return "kv_cache.dtype = 'int4' asks for it"
    return f"--kv-cache-dtype {dtype} asks for it"
