"""The tensors of a model that is known by its config.json alone, as transformers would make them.

Nothing is computed or allocated: parameters are made on the meta device, with shapes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_quantkit._safetensors import TensorHeader
from vllm_quantkit.errors import UnsupportedScheme

HEAD = "lm_head.weight"

NO_FILE = Path()
"""`TensorHeader.file` of tensors that no file holds."""


def tensors_of_config(config: Mapping[str, Any], model: str) -> dict[str, TensorHeader]:
    """Every tensor of the model in 16 bits, by its name; experts that are one tensor taken apart.

    Raises:
        UnsupportedScheme: transformers does not know the model, or cannot build it.
    """
    return {
        name: TensorHeader(tuple(tensor.shape), tensor.dtype, NO_FILE)
        for name, tensor in _taken_apart(_state(config, model))
    }


def _state(config: Mapping[str, Any], model: str) -> dict[str, Tensor]:
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    kind = plain.pop("model_type", "unknown")
    try:
        described = AutoConfig.for_model(kind, **plain)
        text = described.get_text_config()
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(text, dtype=_dtype(text))
    except Exception as error:  # transformers raises whatever a config makes it stumble on
        raise UnsupportedScheme(
            f"{model} has no safetensors files to read, and transformers cannot tell its tensors "
            f"from config.json (model_type {kind!r}: {error}). Give a folder with the weights."
        ) from error
    state: dict[str, Tensor] = built.state_dict()
    if getattr(text, "tie_word_embeddings", False):
        state.pop(HEAD, None)
    return state


def _dtype(text: Any) -> torch.dtype:
    found = getattr(text, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _taken_apart(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """[E, N, K] as E matrices, named as most checkpoints name them."""
    for name, tensor in state.items():
        parent, _, leaf = name.rpartition(".")
        if tensor.dim() != 3 or not parent.endswith("experts"):
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor):
            yield f"{parent}.{expert}.{leaf.removesuffix('.weight')}.weight", matrix
