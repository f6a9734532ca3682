"""Random LoRA adapters made by `peft`, and reference models that have one on top."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 4

ADAPTER_SHARE = 0.5
"""About how large an adapter's part of a layer's output is beside the base's."""


def lora_config() -> LoraConfig:
    """Rank 8 on every projection, with a scale, alpha / rank, that is not 1."""
    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"
    )


def random_adapter(model_folder: Path, out: Path, *, seed: int = 1) -> Path:
    """Writes an adapter for every projection of the model to `out`; no part of it is zero."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapted = get_peft_model(model, lora_config())
    randomise_adapter(adapted, seed)
    adapted.save_pretrained(out)
    return out


@torch.no_grad()
def randomise_adapter(adapted: PeftModel, seed: int) -> None:
    """A and B from normal distributions: `peft` starts with B = 0, which changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_A" in name:
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        elif "lora_B" in name:
            std = ADAPTER_SHARE * RANK / ALPHA * RANK**-0.5
            weight.normal_(std=std, generator=generator)


class AdaptedLinear(nn.Module):
    """y = base(x) + scale B A x, in float32.

    Attributes:
        dense: the base's own, whose shape tells the layer's.
    """

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.A, self.B, self.scale = base, A, B, scale
        self.dense = base.dense

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x.float() @ self.A.T @ self.B.T)


def with_adapter(reference: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The reference model with the adapter on top of its linear layers, in place."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]:
        A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        layer = name.removeprefix("base_model.model.")
        base = reference.get_submodule(layer)
        reference.set_submodule(layer, AdaptedLinear(base, A, B, ALPHA / RANK))
    return reference
