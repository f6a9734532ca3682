"""The linear layers that a checkpoint has, one by one, and how each is stored or will be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from vllm_quantkit._safetensors import TensorHeader
from vllm_quantkit.checkpoint import EMBEDDINGS, WEIGHT, audit
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.footprint.facts import Model
from vllm_quantkit.schemes import get_method
from vllm_quantkit.spec import LayerRules, LayerShape, SchemeSpec

HEADS = ("lm_head", "output", "embed_out")
"""Last parts of the names of output heads; in every other place they are something else."""

UNQUANTISED = frozenset({"gate", "router", "shared_expert_gate", "score", "classifier"})
"""Last parts of the names of layers that vLLM never quantises: routers of mixtures."""

CONV1D = ("gpt2", "gpt_bigcode", "openai-gpt")
"""Families whose linear layers are stored [in, out]."""

CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")

OTHER_TOWERS = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|image\w*|multi_modal\w*|mm_\w+)\.")
"""Parts of a model that see or hear; vLLM leaves most of them in 16 bits."""

BLOCK = re.compile(r"(?<=\.)(layers|h|blocks|block)\.(\d+)(?=\.)")
"""Where a name says which block it is in."""

NOT_WEIGHTS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Ends of the names of tensors that old checkpoints hold and vLLM makes itself."""


@dataclass(frozen=True)
class Layer:
    """A linear layer of the checkpoint.

    Attributes:
        name: in the checkpoint.
        shape: whole.
        spec: how it is stored and multiplied; None for 16 bits.
        bias: True where it has one.
    """

    name: str
    shape: LayerShape
    spec: SchemeSpec | None
    bias: bool


def linear_layers(model: Model, rules: LayerRules) -> list[Layer]:
    """Every linear layer of the language model's blocks, other towers', and the head.

    Args:
        model: any.
        rules: how its layers are stored, or quantised while they load.

    Raises:
        CheckpointError, UnsupportedScheme: the tensors do not fit the rules.
    """
    stored = stored_layers(model, rules) if model.facts.from_headers else {}
    names = {**stored, **dict(_plain_layers(model))}
    return [
        Layer(name, shape, _spec(model, name, rules, stored), f"{name}.bias" in model.tensors)
        for name, shape in names.items()
        if not is_left_out(model, name)
    ]


def stored_layers(model: Model, rules: LayerRules) -> dict[str, LayerShape]:
    """Layers that are stored quantised, or will be quantised on arrival, and their sizes.

    Raises:
        CheckpointError, UnsupportedScheme: the tensors do not fit the rules.
    """
    found = audit(_own_tensors(model), rules)
    return {
        name: _output_major(model, name, layer.shape) for name, layer in found.quantised.items()
    }


def other_tensors(model: Model, layers: list[Layer]) -> Iterator[tuple[str, TensorHeader]]:
    """Tensors that are not of linear layers: embeddings, norms, biases of norms, and the like."""
    names = {layer.name for layer in layers}
    for name, header in _own_tensors(model).items():
        owner = name.rpartition(".")[0]
        inside = owner in names or owner.removesuffix(f".{WEIGHT}") in names
        if not inside and not name.endswith(NOT_WEIGHTS):
            yield name, header


def is_embedding(name: str, header: TensorHeader) -> bool:
    """True for a table of vectors by token, or by position."""
    parts = name.removesuffix(f".{WEIGHT}").split(".")
    return len(header.shape) == 2 and any(part in parts[-1] for part in EMBEDDINGS)


def is_head(name: str) -> bool:
    """True for the output head."""
    return name in HEADS or name.endswith(".lm_head")


def block_of(name: str) -> int | None:
    """The number of the block that a layer is in; None outside the blocks."""
    found = BLOCK.search(name)
    return None if found is None else int(found[2])


def is_left_out(model: Model, name: str) -> bool:
    """True for what vLLM does not load: a tied head, and blocks behind the last one."""
    if is_head(name) and model.facts.tied_embeddings:
        return True
    block = block_of(name)
    if OTHER_TOWERS.search(name) or block is None:
        return False
    return block >= model.facts.num_layers


def count_parameters(model: Model) -> int:
    """Weights, biases, norms and embeddings; tied ones once, and packed ones unpacked."""
    config = model.facts.quantization_config
    rules = LayerRules()
    if config is not None and model.facts.from_headers:
        try:
            rules = get_method("quantkit").rules(config)
            layers = linear_layers(model, rules)
        except QuantkitError:  # what is stored cannot be told apart from its companions
            return sum(prod(header.shape) for header in model.tensors.values())
    else:
        layers = linear_layers(model, rules)
    sizes = sum(
        layer.shape.out_features * (layer.shape.in_features + layer.bias) for layer in layers
    )
    return sizes + sum(prod(header.shape) for _, header in other_tensors(model, layers))


def _own_tensors(model: Model) -> Mapping[str, TensorHeader]:
    """Those that vLLM loads."""
    return {
        name: header
        for name, header in model.tensors.items()
        if not is_left_out(model, name.rpartition(".")[0])
    }


def _plain_layers(model: Model) -> Iterator[tuple[str, LayerShape]]:
    """Layers with a weight [N, K] in 16 or 32 bits."""
    for tensor, header in model.tensors.items():
        name, _, leaf = tensor.rpartition(".")
        floating = header.dtype.is_floating_point and header.dtype.itemsize > 1
        if leaf != WEIGHT or len(header.shape) != 2 or 0 in header.shape or not floating:
            continue
        if not is_embedding(tensor, header):
            rows, columns = header.shape
            shape = LayerShape(out_features=rows, in_features=columns)
            yield name, _output_major(model, name, shape)


def _output_major(model: Model, name: str, shape: LayerShape) -> LayerShape:
    """The shape [out, in] of what some families store the other way round."""
    if model.facts.model_type not in CONV1D or name.rpartition(".")[2] not in CONV1D_LAYERS:
        return shape
    return LayerShape(out_features=shape.in_features, in_features=shape.out_features)


def _spec(
    model: Model, name: str, rules: LayerRules, stored: Mapping[str, LayerShape]
) -> SchemeSpec | None:
    if name.rpartition(".")[2] in UNQUANTISED or OTHER_TOWERS.search(name):
        return None
    if model.facts.from_headers and name not in stored:
        return None
    return rules.scheme_for(name)
