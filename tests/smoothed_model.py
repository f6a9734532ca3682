"""SmoothQuant written out for a transformers model, channel by channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ALPHA = 0.5


@torch.no_grad()
def smooth(model: PreTrainedModel, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Smooths every linear layer of a float32 model's blocks, in place.

    Args:
        model: of Llama's, Qwen's or Gemma's structure.
        stats: layer to the largest input of each channel.

    Returns:
        layer to the factors of its input.
    """
    factors: dict[str, Tensor] = {}
    for index, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        gemma = hasattr(block, "pre_feedforward_layernorm")
        norm = block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm
        prefix = f"model.layers.{index}"
        # v and up first: what feeds them is chosen for the rows they will have.
        factors[f"{prefix}.self_attn.o_proj"] = smooth_rows(
            attention.v_proj,
            attention.o_proj,
            stats[f"{prefix}.self_attn.o_proj"],
            attention.head_dim,
        )
        factors[f"{prefix}.mlp.down_proj"] = smooth_rows(
            mlp.up_proj, mlp.down_proj, stats[f"{prefix}.mlp.down_proj"], len(mlp.up_proj.weight)
        )
        for source, parent, names in (
            (block.input_layernorm, "self_attn", ("q_proj", "k_proj", "v_proj")),
            (norm, "mlp", ("gate_proj", "up_proj")),
        ):
            readers = {f"{prefix}.{parent}.{name}": name for name in names}
            layers = [block.get_submodule(f"{parent}.{name}") for name in names]
            s = smooth_norm(source, layers, [stats[name] for name in readers], gemma=gemma)
            factors |= dict.fromkeys(readers, s)
    return factors


def power(largest: Tensor, weights: Tensor) -> Tensor:
    """2 ** round(log2(max|X| ** alpha / max|W| ** (1 - alpha)))."""
    return 2 ** torch.round(torch.log2(largest**ALPHA / weights ** (1 - ALPHA)))


def smooth_norm(
    norm: nn.Module, layers: list[nn.Module], stats: list[Tensor], *, gemma: bool
) -> Tensor:
    """Norm / s and W s; returns s."""
    weights = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0)
    s = power(torch.stack(stats).amax(0), weights)
    for layer in layers:
        layer.weight *= s
    norm.weight.copy_((norm.weight + 1) / s - 1 if gemma else norm.weight / s)
    return s


def smooth_rows(source: nn.Module, reader: nn.Module, stats: Tensor, width: int) -> Tensor:
    """Row c of the source / s[c], columns that read it * s[c]; returns each column's s."""
    sharers = reader.weight.shape[1] // len(source.weight)
    factors = torch.empty(reader.weight.shape[1])
    for channel in range(len(source.weight)):
        head, offset = divmod(channel, width)
        columns = [(head * sharers + sharer) * width + offset for sharer in range(sharers)]
        s = power(stats[columns].max(), reader.weight[:, columns].abs().max())
        source.weight[channel] /= s
        if source.bias is not None:
            source.bias[channel] /= s
        reader.weight[:, columns] *= s
        factors[columns] = s
    return factors
