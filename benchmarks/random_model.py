"""A random Llama of realistic size, in 16 bits and as AWQ with the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from quantkit_kernels.quant_math import dequantize_codes, minmax_scales, quantize_codes
from vllm_quantkit.formats import Role, get_format
from vllm_quantkit.spec import LayerShape, SchemeSpec, WeightSpec

AWQ = SchemeSpec(
    dialect="awq",
    weight=WeightSpec(bits=4, group_size=128, symmetric=False),
    variant="gemm",
)
TOKENIZER = Path("examples/tiny-lm/bf16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def config_0_7b() -> LlamaConfig:
    """673 M parameters: 541 M in linear layers, 131 M in embedding and head."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=12,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def make_pair(config: LlamaConfig, folder: Path) -> tuple[Path, Path]:
    """Write `folder`/bf16 and `folder`/awq once; later calls find them.

    The 16-bit weights are the dequantised codes, so both models compute the same.
    """
    original, quantized = folder / "bf16", folder / "awq"
    if not quantized.exists():
        plain, packed = _random_weights(config)
        _write(original, config, plain, None)
        _write(quantized, config, packed, _awq_config(config))
    return original, quantized


def _awq_config(config: LlamaConfig) -> dict[str, Any]:
    return get_format("awq").render(dict.fromkeys(_linear_shapes(config), AWQ), ("lm_head",))


def _random_weights(config: LlamaConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same weights twice: bfloat16, and AWQ tensors."""
    torch.manual_seed(0)
    shared = _unquantized(config)
    plain, packed = dict(shared), dict(shared)
    for name, shape in _linear_shapes(config).items():
        codes, scales, zeros = _quantized_layer(shape)
        weight = dequantize_codes(codes, scales, zeros).flatten(1)
        plain[f"{name}.weight"] = weight.bfloat16()
        parts = {
            Role.CODES: codes.flatten(1),
            Role.SCALES: scales.squeeze(-1).half(),
            Role.ZEROS: zeros.squeeze(-1),
        }
        for tensor in get_format("awq").tensors(AWQ, shape):
            packed[f"{name}.{tensor.name}"] = tensor.encode(parts[tensor.role]).contiguous()
    return plain, packed


def _quantized_layer(shape: LayerShape) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, G, g], scales and zero-points [N, G, 1] of a random layer."""
    weight = torch.randn(shape.out_features, shape.in_features) * shape.in_features**-0.5
    groups = weight.unflatten(1, (-1, AWQ.weight.group_size))
    scales, zeros = minmax_scales(groups, AWQ.weight.bits, symmetric=False)
    scales = scales.half().float()
    return quantize_codes(groups, scales, zeros, AWQ.weight.bits), scales, zeros


def _linear_shapes(config: LlamaConfig) -> dict[str, LayerShape]:
    """Every linear layer of the decoder blocks."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{i}.{name}": LayerShape(out_features=n, in_features=k)
        for i in range(config.num_hidden_layers)
        for name, (n, k) in sizes.items()
    }


def _unquantized(config: LlamaConfig) -> dict[str, Tensor]:
    """Embedding, head and norms."""
    size = (config.vocab_size, config.hidden_size)
    norms = ["model.norm"] + [
        f"model.layers.{i}.{name}"
        for i in range(config.num_hidden_layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    return {
        "model.embed_tokens.weight": torch.randn(size).bfloat16(),
        "lm_head.weight": (torch.randn(size) * config.hidden_size**-0.5).bfloat16(),
        **{f"{norm}.weight": torch.ones(config.hidden_size).bfloat16() for norm in norms},
    }


def _write(
    folder: Path,
    config: LlamaConfig,
    tensors: dict[str, Tensor],
    quantization_config: dict[str, object] | None,
) -> None:
    """A model folder, whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    content = config.to_dict()
    if quantization_config is not None:
        content["quantization_config"] = quantization_config
    (partial / "config.json").write_text(json.dumps(content, indent=2, default=str))
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, partial / name)
    partial.rename(folder)
