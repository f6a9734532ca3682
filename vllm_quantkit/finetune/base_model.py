"""Loading a model in transformers whose linear layers stay quantised, as a base for adapters."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vllm_quantkit.checkpoint import (
    QuantisedLayer,
    audit,
    read_headers,
    read_quantization_config,
)
from vllm_quantkit.errors import CheckpointError, ConfigError
from vllm_quantkit.finetune.frozen_linear import FrozenLinear
from vllm_quantkit.finetune.stored_weights import Headers, read_tensors, read_weight
from vllm_quantkit.options import Options
from vllm_quantkit.schemes import get_method
from vllm_quantkit.schemes.at_load import load_rules, refuse_load_options
from vllm_quantkit.spec import LayerRules

logger = logging.getLogger(__name__)


def load_frozen(
    folder: Path | str,
    *,
    method: str | None = None,
    options: Options | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The model in `folder` with every quantised linear layer as a `FrozenLinear`.

    It takes the memory of the quantised model, and nothing in it trains: give it to
    `peft.get_peft_model`, train, and save the adapter (not the model) for vLLM's `--enable-lora`.
    Weights are those that vLLM serves with `--quantization`. Activations are not quantised here,
    also where the method quantises them when it serves: rounding has no gradient.

    Args:
        folder: a checkpoint of any dialect that quantkit serves, or a 16-bit model.
        method: as given to `--quantization`; needed for a 16-bit model, which it quantises layer
            by layer as it is read.
        options: as given to `--additional-config` under `quantkit`.
        dtype: of everything that is not quantised, and of adapters.

    Raises:
        ConfigError, UnsupportedScheme: the method or the options do not fit the folder.
        CheckpointError: tensors are missing or damaged, or belong to another model.
    """
    folder, options = Path(folder), options or Options()
    headers = read_headers(folder)
    quantised = audit(headers, _rules(folder, method, options)).quantised
    model = _skeleton(folder, dtype)
    for name, layer in quantised.items():
        _freeze(model, name, layer, headers, dtype)
    _load_rest(model, headers, quantised, dtype)
    return model.requires_grad_(False).eval()


def _rules(folder: Path, method: str | None, options: Options) -> LayerRules:
    try:
        config = read_quantization_config(folder)
    except ConfigError:
        if method is None:
            raise ConfigError(
                f"{folder} is a 16-bit model (its config.json has no quantization_config), so say "
                f"how to quantise it, for example load_frozen(..., method='quantkit-int4')."
            ) from None
        return load_rules(get_method(method), options)
    chosen = get_method(method or "quantkit")
    refuse_load_options(chosen, options)
    return chosen.rules(config)


def _skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its parameters, which lie on the meta device."""
    # It comes with peft.
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _freeze(
    model: PreTrainedModel,
    name: str,
    layer: QuantisedLayer,
    headers: Headers,
    dtype: torch.dtype,
) -> None:
    """Put a `FrozenLinear` in the place of the linear layer `name`; its bias is loaded later."""
    linear = dict(model.named_modules()).get(name)
    if not isinstance(linear, nn.Linear | Conv1D):
        raise CheckpointError(
            f"{name} is quantised, but in transformers' {type(model).__name__} it is "
            f"{'missing' if linear is None else type(linear).__name__}, not a linear layer. Only "
            f"models whose quantised layers are linear can be trained on; serve this one instead."
        )
    weight = read_weight(headers, name, layer, transposed=isinstance(linear, Conv1D))
    expected = linear.weight.shape[::-1] if isinstance(linear, Conv1D) else linear.weight.shape
    if weight.codes.shape != expected:
        raise CheckpointError(
            f"{name} is {list(weight.codes.shape)} in the checkpoint, but {list(expected)} in the "
            f"model; config.json describes another model."
        )
    model.set_submodule(name, FrozenLinear(weight, linear.bias, dtype))


def _load_rest(
    model: PreTrainedModel, headers: Headers, quantised: Collection[str], dtype: torch.dtype
) -> None:
    """Everything that is not quantised: embeddings, norms, biases, layers in 16 bits."""
    plain = [name for name in headers if not _is_quantised(name, quantised)]
    known = model.state_dict().keys()
    if unknown := sorted(set(plain) - known):
        logger.warning(
            "%s is not in the model and left out (%d such tensors).", unknown[0], len(unknown)
        )
    for name, tensor in read_tensors(headers, [name for name in plain if name in known]).items():
        value = tensor.to(dtype) if tensor.is_floating_point() else tensor
        model.load_state_dict({name: value}, strict=False, assign=True)
    if not isinstance(model.get_output_embeddings(), FrozenLinear):
        model.tie_weights()
    if missing := [name for name, value in model.named_parameters() if value.is_meta]:
        raise CheckpointError(
            f"{missing[0]} is not in the checkpoint ({len(missing)} such tensors); its names are "
            f"not those of transformers' {type(model).__name__}: load and save it with "
            f"transformers first."
        )


def _is_quantised(tensor: str, quantised: Collection[str]) -> bool:
    """True for what `read_weight` has read; the bias beside it is not quantised."""
    layer, _, leaf = tensor.rpartition(".")
    return leaf != "bias" and (layer in quantised or layer.removesuffix(".weight") in quantised)
