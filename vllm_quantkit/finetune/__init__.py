"""Training LoRA adapters on a quantised base, in transformers with `peft`."""

from vllm_quantkit.finetune.base_model import load_frozen
from vllm_quantkit.finetune.frozen_linear import FrozenLinear

__all__ = ["FrozenLinear", "load_frozen"]
