"""Short words for schemes, and checkpoints that mix several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.helpers import QuantizedPair, block_linears, dequantized_weights, output_major
from vllm_quantkit.quantize.methods.rtn import rtn
from vllm_quantkit.quantize.output.checkpoint import Exchange, exchange_layers, write_checkpoint
from vllm_quantkit.spec import LayerRules, SchemeSpec, WeightSpec


def awq(group_size: int, *, symmetric: bool = False, variant: str = "gemm") -> SchemeSpec:
    weight = WeightSpec(bits=4, group_size=group_size, symmetric=symmetric)
    return SchemeSpec(dialect="awq", weight=weight, variant=variant)


def gptq(bits: int, group_size: int, variant: str = "gptq", **numerics: bool) -> SchemeSpec:
    weight = WeightSpec(bits=bits, group_size=group_size, **numerics)
    return SchemeSpec(dialect="gptq", weight=weight, variant=variant)


def compressed(bits: int, group_size: int, **numerics: bool) -> SchemeSpec:
    weight = WeightSpec(bits=bits, group_size=group_size, **numerics)
    return SchemeSpec(dialect="compressed-tensors", weight=weight, variant="pack-quantized")


def ruled_checkpoint(
    model_dir: Path,
    rules: LayerRules,
    config: Mapping[str, Any],
    out_dir: Path,
    *,
    unstored: tuple[str, ...] = (),
) -> QuantizedPair:
    """Rounds each linear layer, and the head, as `rules` say; `config` claims what they are.

    Args:
        model_dir: a transformers folder.
        rules: what to do; written out by hand in the tests, so that it checks `parse` too.
        config: the checkpoint's `quantization_config`.
        out_dir: gets `quantized/` and `twin/`.
        unstored: optional tensors to leave out wherever the scheme allows it.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    linears, layers, exchange = linear_layers(model), {}, {}
    for name, linear in linears.items():
        if (scheme := rules.scheme_for(name)) is None:
            continue
        weight = output_major(linear)
        order = torch.randperm(weight.shape[1], generator=generator)
        layers[name] = rtn(weight, scheme.weight, order=order if scheme.weight.act_order else None)
        exchange |= without(exchange_layers({name: layers[name]}, scheme), unstored, scheme)
    settings = {"quantization_config": dict(config)}
    write_checkpoint(model_dir, out_dir / "quantized", exchange, settings)
    twin = dequantized_weights(model, linears, layers)
    write_checkpoint(model_dir, out_dir / "twin", twin, {"dtype": "float32"})
    return QuantizedPair(out_dir / "quantized", out_dir / "twin", layers)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of the blocks, and a head that is not tied."""
    tied = model.config.tie_word_embeddings
    return {**block_linears(model), **({} if tied else {"lm_head": model.lm_head})}


def without(exchange: Exchange, unstored: tuple[str, ...], scheme: SchemeSpec) -> Exchange:
    """Leaves out optional tensors; a stored order is never optional."""
    dropped = {name for name in unstored if not (name == "g_idx" and scheme.weight.act_order)}
    return {
        weight: {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in dropped}
        for weight, tensors in exchange.items()
    }
