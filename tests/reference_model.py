"""A transformers model whose linear layers compute what a scheme means, in float32.

Straight from the definitions: the weight dequantised, the activations quantised and dequantised
again; no kernel is involved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit_kernels.act_quant import RowQuantizer, reference_quantize
from quantkit_kernels.llm_int8 import reference_llm_int8
from quantkit_kernels.wna16 import QuantizedWeight
from tests.helpers import block_linears, output_major
from vllm_quantkit.quantize.methods.data_free import quantize_data_free
from vllm_quantkit.spec import ActivationSpec, LayerRules, SchemeSpec


class ReferenceLinear(nn.Module):
    """y = Q(x) W^T + b in float32.

    Attributes:
        static: scale and zero-point of the activations, float32 [1] each, where they are static.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        spec: ActivationSpec | None,
        static: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.spec, self.static = weight, bias, spec, static
        self.dense = weight.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        if spec is not None and spec.outlier_threshold is not None:
            return reference_llm_int8(x, self.weight, spec.outlier_threshold, None, self.bias)
        if spec is not None:
            quantizer = RowQuantizer(
                spec.code, spec.group_size, spec.symmetric, spec.upper_bound or inf
            )
            rows = reference_quantize(x.flatten(0, -2), quantizer, *self.static)
            x = rows.dequantize().view(x.shape)
        return nn.functional.linear(x.float(), self.dense, self.bias)


def layer_input(rows: int, channels: int) -> Tensor:
    """float32 [rows, channels], the same in every process."""
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(channels))


def load_reference(
    folder: Path,
    layers: Mapping[str, tuple[QuantizedWeight, SchemeSpec]],
    static: Mapping[str, tuple[Tensor | None, Tensor | None]] | None = None,
) -> PreTrainedModel:
    """The model in `folder` with these linear layers replaced."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    for name, (weight, spec) in layers.items():
        bias = model.get_submodule(name).bias
        how = (static or {}).get(name, (None, None))
        model.set_submodule(name, ReferenceLinear(weight, bias, spec.activation, how))
    return model.eval()


MERGED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""Layers of a checkpoint to the one vLLM makes of them."""


def merged_outputs(model: PreTrainedModel, layers: Iterable[str], rows: int) -> dict[str, Tensor]:
    """vLLM's linear layers to what they make of `layer_input`: float32 [rows, N]."""
    parts: dict[str, list[Tensor]] = {}
    for name in layers:
        module = model.get_submodule(name)
        parent, _, leaf = name.rpartition(".")
        x = layer_input(rows, module.dense.shape[1])
        parts.setdefault(f"{parent}.{MERGED.get(leaf, leaf)}", []).append(module(x))
    return {name: torch.cat(outputs, dim=-1) for name, outputs in parts.items()}


def quantize_as_at_load(
    folder: Path, rules: LayerRules
) -> dict[str, tuple[QuantizedWeight, SchemeSpec]]:
    """Each linear layer of the blocks, and the head, as its rule quantises it at load."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    layers = {}
    for name, linear in block_linears(model).items():
        spec = rules.scheme_for(name)
        if spec is not None:
            weight = quantize_data_free(output_major(linear), spec.weight, spec.variant)
            layers[name] = (weight, spec)
    return layers
