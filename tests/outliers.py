"""A twin of a model with the outlier channels that large models have, and the same outputs.

Some channels of a norm are 30 to 60 times larger, and the columns of the layers that read them as
much smaller (the inverse of SmoothQuant, arXiv 2211.10438); likewise between v and o, up and down.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_quantkit.quantize.methods.smoothquant import Sharing
from vllm_quantkit.quantize.model.model_map import SourceKind, Stage
from vllm_quantkit.quantize.model.model_shell import ModelShell

SMALLEST, LARGEST = 30.0, 60.0
"""Range of the factors, as channels of large models stand out (arXiv 2208.07339)."""

SHARE = 0.01
"""Of the channels; at least one."""


def outlier_twin(model_folder: Path, out: Path, *, share: float = SHARE, seed: int = 0) -> Path:
    """Writes the model to `out` in float32, with outlier channels in every linear layer's input.

    The logits are those of the model, up to rounding in float32. As in large models, the channels
    are the same in all blocks, and the norms of a block have theirs in common; factors differ.

    Args:
        model_folder: a transformers folder of a family in `quantize.model.model_map`.
        out: must not exist.
        share: of the channels that become outliers.
        seed: of channels and factors.
    """
    shell = ModelShell.open(model_folder)
    generator = torch.Generator().manual_seed(seed)
    channels: dict[int, Tensor] = {}
    changed: dict[str, Tensor] = {}
    for index in range(shell.block_count):
        with shell.block(index) as block:
            for stage in shell.stages(index):
                count = channels_of(block, stage)
                if count not in channels:
                    chosen = torch.randperm(count, generator=generator)
                    channels[count] = chosen[: max(1, round(share * count))]
                factors = torch.rand(len(channels[count]), generator=generator)
                factors = SMALLEST + factors * (LARGEST - SMALLEST)
                enlarge_source(block, stage, channels[count], factors)
            names = shell.block_tensors(index)
            changed |= zip(names, block.state_dict().values(), strict=True)
    write_twin(model_folder, out, changed)
    return out


def channels_of(block: nn.Module, stage: Stage) -> int:
    """Channels of what the stage reads, each counted once for all heads that share it."""
    return block.get_submodule(stage.layers[0]).weight.shape[1] // stage.sharing.sharers


def enlarge_source(block: nn.Module, stage: Stage, channels: Tensor, factors: Tensor) -> None:
    """Channels of the stage's source become `factors` times larger; the block stays the same."""
    assert stage.source is not None, f"nothing is known to feed {stage.layers}"
    source = block.get_submodule(stage.source.module)
    readers = [block.get_submodule(name) for name in (*stage.layers, *stage.also)]
    scale = torch.ones(channels_of(block, stage)).index_copy(0, channels, factors)
    enlarge(source, stage.source.kind, readers, scale, stage.sharing)


@torch.no_grad()
def enlarge(
    source: nn.Module,
    kind: SourceKind,
    readers: Sequence[nn.Module],
    scale: Tensor,
    sharing: Sharing,
) -> None:
    """source[c] *= scale[c], and the columns that read channel c /= scale[c].

    Args:
        source: a norm, or a linear layer whose last rows are the channels.
        kind: of the source.
        readers: have a `weight` [N, K].
        scale: float32 [K / sharers].
        sharing: which of the K columns read which channel.
    """
    if kind == "norm_plus_one":
        source.weight.copy_((1 + source.weight) * scale - 1)
    else:
        for tensor in (source.weight, getattr(source, "bias", None)):
            if tensor is not None:
                last = tensor[len(tensor) - len(scale) :]
                last *= scale.view(-1, *[1] * (tensor.dim() - 1))
    columns = scale.view(-1, 1, sharing.width).expand(-1, sharing.sharers, -1).flatten()
    for reader in readers:
        reader.weight /= columns


def write_twin(source: Path, out: Path, changed: dict[str, Tensor]) -> None:
    """`out` = `source` in float32 with the changed tensors exchanged."""
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        stored = {name: changed.get(name, value) for name, value in load_file(file).items()}
        stored = {name: value.float().contiguous() for name, value in stored.items()}
        save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
