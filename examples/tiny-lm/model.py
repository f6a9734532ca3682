"""The demo model: its shape, its held-out loss, and its folder on disk."""

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)


def model_config(tokenizer_size: int, context: int, ids: dict[str, int]) -> LlamaConfig:
    """Llama with grouped-query attention and tied embeddings; widths are multiples of 256."""
    return LlamaConfig(
        vocab_size=tokenizer_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["bos"],
        use_cache=False,
    )


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, stream: Tensor, context: int, bos: int, rows: int | None = None
) -> float:
    """Mean nats per token over windows of context - 1 tokens, each after `bos`.

    The windows follow one another; `rows` limits their number.
    """
    device, length = model.device, context - 1
    ids = stream[: stream.numel() // length * length].view(-1, length).long()[:rows]
    ids = torch.cat([torch.full((ids.shape[0], 1), bos), ids], dim=1)
    model.eval()
    total = sum(float(model(row[None].to(device), labels=row[None].to(device)).loss) for row in ids)
    model.train()
    return total / ids.shape[0]


def save_model(model: LlamaForCausalLM, tokenizer_folder: Path, out: Path) -> None:
    """Writes bfloat16 weights and the tokenizer to out/bf16, first beside it, then by renaming."""
    fresh, final = out / "bf16.new", out / "bf16"
    shutil.rmtree(fresh, ignore_errors=True)
    config = LlamaConfig.from_dict(model.config.to_dict() | {"use_cache": True})
    copy = LlamaForCausalLM(config)
    copy.load_state_dict(model.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    stops = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    copy.generation_config = GenerationConfig(
        bos_token_id=stops[1], eos_token_id=stops, pad_token_id=stops[1]
    )
    copy.bfloat16().save_pretrained(fresh)
    shutil.copytree(tokenizer_folder, fresh, dirs_exist_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    fresh.rename(final)
