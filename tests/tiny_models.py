"""Random tiny models, one of each family, with a byte-level BPE tokenizer beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D

VOCABULARY = 512
BOS, EOS = "<|begin|>", "<|endoftext|>"  # families' tokenizer classes would add the latter
LICENSE = Path(__file__).parents[1] / "LICENSE"

LOGIT_STD = 3.0
"""About the spread of the logits: neither flat nor one-hot."""


@dataclass(frozen=True)
class TinyModel:
    """A family's config class and what differs from the common sizes.

    Attributes:
        config: the class.
        extra: arguments besides, or instead of, those in `COMMON`.
        embedding_scale: what the family multiplies embeddings by.
    """

    config: type[PreTrainedConfig]
    extra: Mapping[str, Any] = field(default_factory=dict)
    embedding_scale: float = 1.0


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

GEMMA = {
    "query_pre_attn_scalar": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}

TINY_MODELS = {
    "llama": TinyModel(LlamaConfig),
    "mistral": TinyModel(MistralConfig, {"sliding_window": None}),
    "qwen2": TinyModel(Qwen2Config),
    "qwen3": TinyModel(Qwen3Config),
    "gemma2": TinyModel(Gemma2Config, GEMMA, embedding_scale=16),
    "gemma3": TinyModel(Gemma3TextConfig, GEMMA, embedding_scale=16),
    "phi3": TinyModel(Phi3Config),
    "gpt2": TinyModel(GPT2Config, {"n_inner": 512, "n_positions": 512}),
}
"""Family to model."""

QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "mlp_only_layers": [0],
}

LATENT_ATTENTION = {
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 48,
    "head_dim": 32,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
}

MOE_MODELS = {
    "mixtral": TinyModel(MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": TinyModel(
        Qwen2MoeConfig, {**QWEN_EXPERTS, "shared_expert_intermediate_size": 192}
    ),
    "qwen3_moe": TinyModel(Qwen3MoeConfig, QWEN_EXPERTS),
    "deepseek_v2": TinyModel(
        DeepseekV2Config, {**LATENT_ATTENTION, "q_lora_rank": None, "topk_method": "greedy"}
    ),
    "deepseek_v3": TinyModel(DeepseekV3Config, {**LATENT_ATTENTION, "q_lora_rank": 96}),
}
"""Family to model: mixtures of experts; all but Mixtral have a dense block first."""


OTHER_MODELS = {"olmo2": TinyModel(Olmo2Config)}
"""Families that nothing here was made for."""


def create_tiny_model(
    family: str, out: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **extra: Any
) -> Path:
    """Writes a random model of `family` and its tokenizer to `out`; `extra` goes to its config."""
    tiny = (TINY_MODELS | MOE_MODELS | OTHER_MODELS)[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny.config(**{**COMMON, **tiny.extra, **extra}))
    randomise(model, tiny.embedding_scale)
    model.to(dtype).save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    return out


@torch.no_grad()
def randomise(model: PreTrainedModel, embedding_scale: float = 1.0) -> None:
    """Weights that keep activations near 1 and spread the logits; norms and biases vary too.

    Embeddings are small beside what the blocks add, or a model with tied embeddings would predict
    the token it has just read.
    """
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif isinstance(module, nn.Embedding):
                parameter.normal_(std=LOGIT_STD / parameter.shape[1] ** 0.5 / embedding_scale)
            elif parameter is not embeddings:
                fan_in = parameter.shape[0 if isinstance(module, Conv1D) else -1]
                parameter.normal_(std=fan_in**-0.5)
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    if head is not embeddings:
        head.mul_(LOGIT_STD)
    elif embedding_scale != 1:
        model.get_decoder().norm.weight.add_(embedding_scale - 1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 tokens, trained on the licence's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([LICENSE.read_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS
    )
