"""A model, by its config.json and the headers of its safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllm_quantkit._safetensors import TensorHeader
from vllm_quantkit.footprint.config_facts import read_facts, text_config
from vllm_quantkit.footprint.config_tensors import tensors_of_config
from vllm_quantkit.footprint.facts import LayerGroup, Model, ModelFacts, Parallel
from vllm_quantkit.footprint.layers import count_parameters
from vllm_quantkit.footprint.sources import read_folder, read_hub

__all__ = ["LayerGroup", "Model", "ModelFacts", "Parallel", "read_model"]

UNSIZED = "quant_state.bitsandbytes"
"""Part of the names of tensors whose bytes say how large a layer is: headers alone do not."""


def read_model(model: str, revision: str | None = None) -> Model:
    """The model in a folder, or of that name on the hub; no weight is read or downloaded.

    Args:
        model: folder, which may hold config.json alone, or a name on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: there is no such model, it cannot be reached, or a file is malformed.
        UnsupportedScheme: there are no safetensors files, and transformers does not know the
            model.
    """
    source = read_folder(Path(model)) if Path(model).is_dir() else read_hub(model, revision)
    facts = read_facts(model, source.config, has_head=_has_head(source.tensors))
    tensors: Mapping[str, TensorHeader] = source.tensors
    listed = bool(tensors) and (source.local or not any(UNSIZED in name for name in tensors))
    if not listed:
        tensors = tensors_of_config(source.config, model)
    facts = facts.model_copy(update={"from_headers": listed})
    read = Model(facts, text_config(source.config), tensors)
    parameters = count_parameters(read)
    return Model(facts.model_copy(update={"parameters": parameters}), read.config, tensors)


def _has_head(tensors: Mapping[str, TensorHeader]) -> bool | None:
    """True where the files hold an output head, None where there are none."""
    return any(name.startswith("lm_head.") for name in tensors) if tensors else None
