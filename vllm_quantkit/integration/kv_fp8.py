"""FP8 keys and values with a calibration's scales: k / k_scale, v / v_scale in E4M3."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod


class FP8Scales(BaseKVCacheMethod):  # type: ignore[misc]
    """Sets an attention layer's scales when its weights are loaded; the checkpoint has none."""

    def __init__(self, k_scale: float, v_scale: float) -> None:
        self._scales = {"k": k_scale, "v": v_scale}

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """The scales, in each of the places where vLLM's backends look for them."""
        for name, scale in self._scales.items():
            getattr(layer, f"_{name}_scale").fill_(scale)
            setattr(layer, f"_{name}_scale_float", scale)
            setattr(layer, f"_{name}_scale_cpu", torch.tensor(scale, dtype=torch.float32))
