"""Runs of the whole quantiser on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllm_quantkit._safetensors import read_headers, read_quantization_config
from vllm_quantkit.checkpoint import audit
from vllm_quantkit.formats import get_format
from vllm_quantkit.quantize.calibration import TokenSet, TokenSets
from vllm_quantkit.quantize.output.report import Report
from vllm_quantkit.quantize.output.verify import read_layer
from vllm_quantkit.quantize.pipeline import quantize
from vllm_quantkit.quantize.progress import Watcher
from vllm_quantkit.quantize.recipes.recipe_file import make_recipe
from vllm_quantkit.quantize.run_options import RunOptions


def random_sets(samples: int = 8, length: int = 32, held_out: int = 3) -> TokenSets:
    """Random tokens of the tiny models' vocabulary."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"calibration": samples, "held out": held_out}
    tokens = {
        name: torch.randint(2, 512, (size, length), generator=generator)
        for name, size in sizes.items()
    }
    sets = (
        TokenSet(input_ids=ids, attention_mask=None, source=name) for name, ids in tokens.items()
    )
    return TokenSets(*sets, ())


def run(
    source: Path,
    out: Path,
    keys: dict[str, Any],
    sets: TokenSets | None = None,
    *,
    watcher: Watcher | None = None,
    **options: Any,
) -> Report:
    """Quantises with a recipe of these keys."""
    options = {"batch_tokens": 64} | options
    return quantize(
        source, out, make_recipe(keys), sets, run=RunOptions(**options), watcher=watcher
    )


def load(folder: Path) -> PreTrainedModel:
    """A 16-bit model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def dequantized(source: Path, out: Path) -> PreTrainedModel:
    """The source's model with what `out` stores, its codes dequantised, in float32."""
    model, config = load(source), read_quantization_config(out)
    headers = read_headers(out)
    rules = get_format(str(config["quant_method"])).parse(config)
    for name, layer in audit(headers, rules).quantised.items():
        weight = read_layer(out, name, layer.spec).dequantize()
        model.get_submodule(name).weight.data.copy_(weight)
    stored = stored_tensors(out)
    for name, parameter in model.named_parameters():
        if name in stored and stored[name].is_floating_point() and stored[name].itemsize > 1:
            parameter.data.copy_(stored[name])
    return model


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float32 [B, T, V]."""
    found: Tensor = model(ids).logits
    return found


def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """exp(mean -log p) of all but the first tokens."""
    log_p = logits(model, ids)[:, :-1].double().log_softmax(-1)
    return float((-log_p.gather(-1, ids[:, 1:, None]).mean()).exp())
