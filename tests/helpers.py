"""Quantised checkpoints of any small model, with the twin they must agree with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.formats import get_format
from vllm_quantkit.quantize.methods.rtn import rtn
from vllm_quantkit.quantize.output.checkpoint import Exchange, exchange_layers, write_checkpoint
from vllm_quantkit.spec import SchemeSpec


@dataclass(frozen=True)
class QuantizedPair:
    """A checkpoint and its reference.

    Attributes:
        quantized: folder of the quantised checkpoint.
        twin: folder of the same model in float32 with dequantised weights.
        layers: layer to what was stored.
    """

    quantized: Path
    twin: Path
    layers: dict[str, QuantizedWeight]


def quantized_checkpoint(
    model_dir: Path,
    scheme: SchemeSpec,
    out_dir: Path,
    *,
    ignore: tuple[str, ...] = ("lm_head",),
    seed: int = 0,
) -> QuantizedPair:
    """Rounds every linear layer of the decoder blocks to nearest and stores it as `scheme` says.

    With `scheme.weight.act_order`, channels share groups in a random order.

    Args:
        model_dir: a transformers folder of any family, safetensors weights.
        scheme: dialect, numerics and variant.
        out_dir: gets `quantized/` and `twin/`.
        ignore: whole names of layers that stay in 16 bits.
        seed: of the random order.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    linears = {name: m for name, m in block_linears(model).items() if name not in ignore}
    layers = {}
    for name, linear in linears.items():
        weight = output_major(linear)
        order = torch.randperm(weight.shape[1], generator=generator)
        layers[name] = rtn(weight, scheme.weight, order=order if scheme.weight.act_order else None)
    schemes = dict.fromkeys(layers, scheme)
    config = {"quantization_config": get_format(scheme.dialect).render(schemes, ignore)}
    write_checkpoint(model_dir, out_dir / "quantized", exchange_layers(layers, scheme), config)
    twin = dequantized_weights(model, linears, layers)
    write_checkpoint(model_dir, out_dir / "twin", twin, {"dtype": "float32"})
    return QuantizedPair(out_dir / "quantized", out_dir / "twin", layers)


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear or Conv1D inside the decoder blocks, by its name in the checkpoint."""
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(name.startswith(f"{blocks}.") for blocks in lists)
    }


def output_major(linear: nn.Module) -> Tensor:
    """The weight as [out, in]; Conv1D stores it transposed."""
    weight = linear.weight.detach()
    return weight.t().contiguous() if isinstance(linear, Conv1D) else weight


def dequantized_weights(
    model: nn.Module, linears: dict[str, nn.Module], layers: dict[str, QuantizedWeight]
) -> Exchange:
    """Every parameter in float32, the quantised weights dequantised and laid out as they were."""
    exchange = {name: {name: value.detach()} for name, value in model.named_parameters()}
    for name, layer in layers.items():
        weight = layer.dequantize()
        laid_out = weight.t().contiguous() if isinstance(linears[name], Conv1D) else weight
        exchange[f"{name}.weight"] = {f"{name}.weight": laid_out}
    return exchange
