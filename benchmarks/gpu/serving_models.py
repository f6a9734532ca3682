"""Models of random weights, folders with a config.json and nothing else, and engines for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.formats import get_format
from vllm_quantkit.spec import PER_CHANNEL, ActivationSpec, WeightSpec

LINEAR_LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

INT4_GROUPS = WeightSpec(bits=4, group_size=128, symmetric=False)
INT8_CHANNELS = WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True)
INT8_TOKENS = ActivationSpec(code="int8")

KV4 = {"additional_config": {"quantkit": {"kv_cache": {"dtype": "int4"}}}}


@dataclass(frozen=True)
class Size:
    """A model and how long its sequences get.

    Attributes:
        config: fields of a LlamaConfig.
        batches: sequences that decode together, behind short prompts; one alone does so besides.
        prompts: tokens of prompts.
        context: tokens before the ones decoded where the cache is the most of what is read.
        tokens: decoded in a measurement.
        options: of every engine.
    """

    config: Mapping[str, Any]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    context: int
    tokens: int
    options: Mapping[str, Any]


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

EIGHT_B = Size(
    config={
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 40960,
    },
    batches=(8, 32, 128),
    prompts=(2048, 8192),
    context=32768,
    tokens=48,
    options={
        "max_num_seqs": 128,
        "max_num_batched_tokens": 9216,  # the longest prompt is one step
        "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 128]},
        # Engines share the GPU: each says what it takes instead of measuring what is free.
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 6 << 30,
    },
)
"""Llama-3-8B."""

TINY = Size(
    config={
        **LLAMA,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 1024,
        "max_position_embeddings": 1024,
    },
    batches=(4,),
    prompts=(128,),
    context=256,
    tokens=16,
    options={"enforce_eager": True, "max_num_seqs": 4},
)
"""For trying the harness out, also on a CPU."""

BF16, KV4_BF16 = "bf16", "quantkit-kv4"
VLLM_AWQ, AWQ, AWQ_KV4 = "vLLM AWQ", "quantkit-awq", "quantkit-awq, INT4 cache"
VLLM_FP8, FP8 = "vLLM FP8", "quantkit-fp8"
VLLM_W8A8, W8A8, INT8 = "vLLM W8A8", "quantkit-smoothquant", "quantkit-int8"

GROUPS = (
    (BF16, VLLM_AWQ, AWQ, VLLM_FP8, FP8),
    (VLLM_W8A8, W8A8, INT8, AWQ_KV4, KV4_BF16),
)
"""Engines that run together and take turns, those of the goals first."""


def make_specs(size: Size, folder: Path) -> dict[str, EngineSpec]:
    """Every engine, its model's folder written below `folder`."""
    plain = write(folder / "bf16", size, None)
    awq = write(folder / "awq", size, rendered("awq", size, INT4_GROUPS, None))
    w8a8 = rendered("compressed-tensors", size, INT8_CHANNELS, INT8_TOKENS)
    int8 = write(folder / "w8a8", size, w8a8)
    return {
        BF16: spec(size, plain),
        VLLM_AWQ: spec(size, awq),
        AWQ: spec(size, awq, "quantkit-awq"),
        VLLM_FP8: spec(size, plain, "fp8"),
        FP8: spec(size, plain, "quantkit-fp8"),
        VLLM_W8A8: spec(size, int8),
        W8A8: spec(size, int8, "quantkit-smoothquant"),
        INT8: spec(size, plain, "quantkit-int8"),
        AWQ_KV4: spec(size, awq, "quantkit-awq", **KV4),
        KV4_BF16: spec(size, plain, "quantkit-kv4"),
    }


def spec(size: Size, model: Path, quantization: str | None = None, **more: Any) -> EngineSpec:
    """An engine that draws its weights at random and has no tokenizer."""
    dummy = {"load_format": "dummy", "skip_tokenizer_init": True}
    options = {**dummy, **size.options, **more}
    longest = max(size.context, *size.prompts) + size.tokens + 32
    return EngineSpec(str(model), quantization, longest, tuple(options.items()))


def rendered(
    dialect: str, size: Size, weight: WeightSpec, activation: ActivationSpec | None
) -> dict[str, Any]:
    """The `quantization_config` of a model whose linear layers are all stored so."""
    form = get_format(dialect)
    scheme = form.scheme(weight, activation)
    layers = [
        f"model.layers.{i}.{name}"
        for i in range(size.config["num_hidden_layers"])
        for name in LINEAR_LAYERS
    ]
    return form.render(dict.fromkeys(layers, scheme), ("lm_head",))


def write(folder: Path, size: Size, quantization_config: Mapping[str, Any] | None) -> Path:
    """A folder with a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(size.config)
    if quantization_config is not None:
        content["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    return folder
