"""Sizes of a causal language model, from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.footprint.facts import ModelFacts

NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "vocab_size": ("vocab_size",),
}
"""What families call sizes that every model has."""

OPTIONAL = {
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels", "attention_head_dim"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim"),
    "max_position": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "top_k_experts",
    ),
}
"""The same for sizes that some configs leave out."""

UNGROUPED = ("gpt2", "gpt_neo", "gptj", "codegen", "opt", "bloom")
"""Families in which every query head has keys of its own, whatever else their configs hold."""

TYING = ("gemma", "gpt2", "cohere", "opt", "bloom")
"""Families whose head is the embedding unless the config denies it."""

WITHOUT_CACHE = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp")
"""Kinds of layers (`layer_types`) that keep no keys and values."""


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that is about text: of models that also see or hear, an inner one."""
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        inner = config.get(name)
        if isinstance(inner, Mapping):
            outer = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
            return {**outer, **text_config(inner)}
    return dict(config)


def read_facts(model: str, config: Mapping[str, Any], *, has_head: bool | None) -> ModelFacts:
    """The facts that config.json tells; parameters are not counted yet.

    Args:
        model: its name, for errors.
        config: config.json.
        has_head: whether the files hold an output head; None where there are none.

    Raises:
        CheckpointError: a size that every model has is missing, or is none.
    """
    text = text_config(config)
    sizes = {name: _needed(model, text, keys) for name, keys in NAMES.items()}
    found = {name: _size(model, text, keys) or 0 for name, keys in OPTIONAL.items()}
    latent = _size(model, text, ("kv_lora_rank",)) or 0
    head_dim = found["head_dim"] or sizes["hidden_size"] // sizes["heads"]
    value_dim = head_dim
    if latent:
        rope = _size(model, text, ("qk_rope_head_dim",)) or 0
        head_dim = (_size(model, text, ("qk_nope_head_dim",)) or 0) + rope
        value_dim = _size(model, text, ("v_head_dim",)) or head_dim
    window, windowed = _windows(text, sizes["num_layers"])
    architectures = config.get("architectures") or ["unknown"]
    return ModelFacts(
        model=model,
        architecture=str(architectures[0]),
        model_type=str(text.get("model_type", "unknown")),
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_layers"],
        heads=sizes["heads"],
        vocab_size=sizes["vocab_size"],
        intermediate_size=found["intermediate_size"] or 4 * sizes["hidden_size"],
        kv_heads=_kv_heads(text, found["kv_heads"], sizes["heads"]),
        head_dim=head_dim,
        value_dim=value_dim,
        max_position=found["max_position"],
        dtype=_dtype(text),
        tied_embeddings=_is_tied(text, has_head),
        mla=bool(latent),
        latent_dim=latent + (_size(model, text, ("qk_rope_head_dim",)) or 0) if latent else 0,
        experts=found["experts"],
        experts_per_token=found["experts_per_token"],
        sliding_window=window,
        windowed_layers=windowed,
        attention_layers=_attention_layers(text, sizes["num_layers"]),
        quantization_config=quantization_config(config),
        parameters=0,
    )


def quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint's quantisation, wherever its config says so; None in 16 bits."""
    for part in (config, text_config(config)):
        for name in ("quantization_config", "compression_config"):
            found = part.get(name)
            if isinstance(found, Mapping) and found:
                return dict(found)
    return None


def _needed(model: str, text: Mapping[str, Any], names: tuple[str, ...]) -> int:
    found = _size(model, text, names)
    if found is None:
        raise CheckpointError(
            f"config.json of {model} has no {names[0]}, so it does not describe a language model. "
            "Download the file again, or give the model's folder."
        )
    return found


def _size(model: str, text: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of `names` that is set.

    Raises:
        CheckpointError: it is no positive integer.
    """
    for name in names:
        value = text.get(name)
        if value is None:
            continue
        if isinstance(value, list) and value and all(isinstance(size, int) for size in value):
            value = max(value)  # families whose layers differ; the largest sizes buffers
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(
                f"config.json of {model} says {name} = {value!r}, but a positive integer is "
                "expected. Download the file again."
            )
        return value or None
    return None


def _kv_heads(text: Mapping[str, Any], given: int, heads: int) -> int:
    if given and not str(text.get("model_type", "")).startswith(UNGROUPED):
        return given
    return 1 if text.get("multi_query") else heads


def _dtype(text: Mapping[str, Any]) -> str:
    name = str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in ("float16", "bfloat16", "float32") else "bfloat16"


def _is_tied(text: Mapping[str, Any], has_head: bool | None) -> bool:
    """As the config says; else there is no head of its own in the files, or the family ties."""
    said = text.get("tie_word_embeddings")
    if said is not None:
        return bool(said)
    if has_head is not None:
        return not has_head
    return str(text.get("model_type", "")).startswith(TYING)


def _windows(text: Mapping[str, Any], layers: int) -> tuple[int | None, int]:
    """The sliding window, and how many layers have it."""
    window = text.get("sliding_window")
    if not isinstance(window, int) or window <= 0 or text.get("use_sliding_window") is False:
        return None, 0
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        windowed = sum(str(kind).startswith("sliding") for kind in kinds)
        return (window, windowed) if windowed else (None, 0)
    pattern = text.get("sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 0:
        return window, layers - layers // pattern
    if str(text.get("model_type", "")).startswith("gemma2"):
        return window, -(-layers // 2)
    return window, layers


def _attention_layers(text: Mapping[str, Any], layers: int) -> int:
    """Layers with keys and values of their own: not those that read another's, nor recurrent."""
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        layers = sum(str(kind) not in WITHOUT_CACHE for kind in kinds)
    shared = text.get("num_kv_shared_layers")
    return layers - shared if isinstance(shared, int) else layers
