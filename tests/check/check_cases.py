"""Models that are only a config.json, and checks of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_quantkit.check import CheckReport, CheckRequest, preflight

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FP8_BLOCKS = {**FP8, "weight_block_size": [128, 128]}


def compressed(**weights: Any) -> dict[str, Any]:
    """4 bits in groups of 128, packed."""
    plain = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": {**plain, "group_size": 128, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def eight_bit(*, activations: bool = True, **weights: Any) -> dict[str, Any]:
    """8 bits per channel, activations per token."""
    common = {"num_bits": 8, "type": "int", "symmetric": True, **weights}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {"strategy": "channel", **common}}
    if activations:
        kind = {"num_bits": 8, "type": common["type"], "symmetric": True}
        group["input_activations"] = {**kind, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if common["type"] == "float" else "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def write_config(folder: Path, quantization: dict[str, Any] | None = None, **config: Any) -> Path:
    """A folder with a Llama's config.json, or one with these keys changed."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**LLAMA, **config}
    if quantization is not None:
        whole["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def check(model: Path | str, quantization: str | None = None, **request: Any) -> CheckReport:
    """On an H200 with vLLM 0.32, unless the request says otherwise."""
    quantkit = request.pop("quantkit", None)
    config = json.dumps({"quantkit": quantkit} if quantkit else {})
    defaults = {"gpu": "H200", "vllm": "0.32", "additional_config": config}
    return preflight(
        CheckRequest(model=str(model), quantization=quantization, **{**defaults, **request})
    )


def sentences(report: CheckReport) -> str:
    """Of all blockers."""
    return "\n".join(blocker.sentence for blocker in report.blockers)
