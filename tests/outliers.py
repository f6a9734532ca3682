"""A twin of a model with the outlier channels that large models have, and the same outputs.

Some channels of a norm are 30 to 60 times larger, and the columns of the layers that read them as
much smaller (the inverse of SmoothQuant, arXiv 2211.10438); likewise between v and o, up and down.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vllm_quantkit.quantize.checkpoint import write_checkpoint
from vllm_quantkit.quantize.model_map import model_map

SMALLEST, LARGEST = 30.0, 60.0
"""Range of the factors, as channels of large models stand out (arXiv 2208.07339)."""

SHARE = 0.01
"""Of the channels; at least one."""


def outlier_twin(model_folder: Path, out: Path, *, share: float = SHARE, seed: int = 0) -> Path:
    """Writes the model to `out` in float32, with outlier channels in every linear layer's input.

    The logits are those of the model, up to rounding in float32. As in large models, the channels
    are the same in all blocks, and the norms of a block have theirs in common; factors differ.

    Args:
        model_folder: a transformers folder of a family in `quantize.model_map`.
        out: must not exist.
        share: of the channels that become outliers.
        seed: of channels and factors.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    layout = model_map(model.config.model_type)
    generator = torch.Generator().manual_seed(seed)
    channels: dict[int, Tensor] = {}
    for block in model.get_submodule(layout.blocks):
        for stage in layout.stages:
            source = block.get_submodule(stage.previous)
            count = len(source.weight)
            if count not in channels:
                chosen = torch.randperm(count, generator=generator)
                channels[count] = chosen[: max(1, round(share * count))]
            readers = [block.get_submodule(name) for name in stage.layers]
            factors = torch.rand(len(channels[count]), generator=generator)
            factors = SMALLEST + factors * (LARGEST - SMALLEST)
            enlarge(source, readers, channels[count], factors, head_size(model.config))
    exchange = {name: {name: value.detach()} for name, value in model.named_parameters()}
    write_checkpoint(model_folder, out, exchange, {"dtype": "float32"})
    return out


@torch.no_grad()
def enlarge(
    source: nn.Module, readers: Sequence[nn.Module], channels: Tensor, factors: Tensor, head: int
) -> None:
    """source[c] *= f, and the columns that read channel c /= f: the function stays the same.

    Args:
        source: a norm or linear layer.
        readers: linear layers; where they have more inputs than the source outputs, several heads
            of `head` channels read each head of the source.
        channels: int64 [n], of the source.
        factors: float32 [n].
        head: channels of an attention head.
    """
    source.weight[channels] *= factors.view(-1, *[1] * (source.weight.dim() - 1))
    if getattr(source, "bias", None) is not None:
        source.bias[channels] *= factors
    scale = torch.ones(len(source.weight)).index_copy(0, channels, factors)
    for reader in readers:
        sharers = reader.weight.shape[1] // len(scale)
        if sharers > 1:
            reader.weight /= scale.view(-1, 1, head).expand(-1, sharers, -1).flatten()
        else:
            reader.weight /= scale


def head_size(config: Any) -> int:
    """Channels of an attention head."""
    size: int | None = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads
