"""Checks that a checkpoint's tensors fit its config, by headers alone, before weights are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_quantkit._safetensors import TensorHeader, read_headers, read_quantization_config
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.formats import FORMATS, CheckpointTensor, get_format
from vllm_quantkit.spec import LayerRules, LayerShape, SchemeSpec

__all__ = [
    "CheckpointAudit",
    "QuantisedLayer",
    "TensorHeader",
    "audit",
    "read_headers",
    "read_quantization_config",
]

WEIGHT = "weight"

BESIDE = frozenset(
    {"bias", "q_scale", "k_scale", "v_scale", "kv_scale", "prob_scale", "output_scale"}
)
"""Tensors that may lie beside a quantised layer's own: biases, and scales of the KV cache."""

EMBEDDINGS = ("embed", "wte", "wpe")
"""Parts of a name that tell an embedding, which no rule for linear layers is about."""

Layer = Mapping[str, TensorHeader]
"""The tensors of one layer, by their name behind the layer's."""


@dataclass(frozen=True)
class QuantisedLayer:
    """A layer that is stored quantised, and its whole size."""

    spec: SchemeSpec
    shape: LayerShape


@dataclass(frozen=True)
class CheckpointAudit:
    """What the headers say, once they were found to fit the rules.

    Attributes:
        quantised: layer name to its scheme and size.
        plain: layers that the rules quantise but the checkpoint stores as a plain `weight`; they
            are served in 16 bits.
    """

    quantised: Mapping[str, QuantisedLayer]
    plain: tuple[str, ...]


def audit(headers: Mapping[str, TensorHeader], rules: LayerRules) -> CheckpointAudit:
    """Match every layer's tensors with what its rule expects.

    Raises:
        CheckpointError: a tensor is missing, unexpected, misshaped or mistyped, or a layer is
            stored quantised although the rules leave it in 16 bits.
        UnsupportedScheme: a layer's size is one that its dialect cannot store.
    """
    known = {name for dialect in FORMATS for name in get_format(dialect).TENSORS}
    quantised, plain = {}, []
    for name, layer in _layers(headers).items():
        spec, stored = rules.scheme_for(name), known & layer.keys()
        if stored == {"scales"} and len(layer["scales"].shape) == 1:
            continue  # AutoAWQ's scaled activation, such as `mlp.act`
        if stored and spec is None:
            raise _unruled(name, layer, stored)
        if stored and spec is not None:
            quantised[name] = QuantisedLayer(spec, _check_layer(name, layer, spec))
        elif spec is not None and _is_linear(name, layer):
            plain.append(name)
    return CheckpointAudit(quantised, tuple(plain))


def _layers(headers: Mapping[str, TensorHeader]) -> dict[str, dict[str, TensorHeader]]:
    layers: dict[str, dict[str, TensorHeader]] = defaultdict(dict)
    for name, header in headers.items():
        layer, _, tensor = name.rpartition(".")
        layers[layer][tensor] = header
    return layers


def _is_linear(name: str, layer: Layer) -> bool:
    last = name.rsplit(".", 1)[-1]
    weight = layer.get(WEIGHT)
    return (
        weight is not None
        and len(weight.shape) == 2
        and weight.dtype.is_floating_point
        and not any(part in last for part in EMBEDDINGS)
    )


def _check_layer(name: str, layer: Layer, spec: SchemeSpec) -> LayerShape:
    shape = _infer_shape(name, layer, spec)
    expected = get_format(spec.dialect).tensors(spec, shape)
    for tensor in expected:
        _check_tensor(name, layer, tensor)
    names = {tensor.name for tensor in expected}
    if unexpected := sorted(layer.keys() - names - BESIDE):
        raise CheckpointError(
            f"{name}.{unexpected[0]} is unexpected: a layer with {_words(spec)} holds "
            f"{', '.join(sorted(names))}. Correct the config if it describes another scheme, or "
            "remove the tensor."
        )
    return shape


def _check_tensor(name: str, layer: Layer, tensor: CheckpointTensor) -> None:
    header = layer.get(tensor.name)
    if header is None:
        if not tensor.optional:
            raise _missing(name, tensor.name, layer)
        return
    if header.shape != tensor.shape:
        raise CheckpointError(
            f"{name}.{tensor.name} in {header.file} has shape {list(header.shape)}, but "
            f"{list(tensor.shape)} is expected. Correct the config (bits, group size, format) "
            "or save the model again."
        )
    if header.dtype not in tensor.dtypes:
        allowed = " or ".join(str(dtype) for dtype in tensor.dtypes)
        raise CheckpointError(
            f"{name}.{tensor.name} in {header.file} has dtype {header.dtype}, but {allowed} is "
            "expected. Correct the config's quant_method and format, or save the model again."
        )


def _infer_shape(name: str, layer: Layer, spec: SchemeSpec) -> LayerShape:
    dialect = get_format(spec.dialect)
    codes = dialect.TENSORS[0]
    if codes not in layer:
        raise _missing(name, codes, layer)
    if len(layer[codes].shape) != 2 or 0 in layer[codes].shape:
        raise CheckpointError(
            f"{name}.{codes} in {layer[codes].file} has shape {list(layer[codes].shape)}, but "
            "a matrix is expected. Only linear layers are served quantised; save the model again "
            "with this one in 16 bits."
        )
    shapes = {tensor: header.shape for tensor, header in layer.items()}
    return dialect.infer_shape(spec, shapes, _stored_size(name, layer))


def _stored_size(name: str, layer: Layer) -> tuple[int, int] | None:
    """(N, K) as the layer's `weight_shape` holds it, if it has one that can be read."""
    header = layer.get("weight_shape")
    if header is None or header.shape != (2,) or header.dtype not in (torch.int64, torch.int32):
        return None
    match header.read_integers():
        case [int(N), int(K)] if N > 0 and K > 0:
            return N, K
        case []:
            return None
        case values:
            raise CheckpointError(
                f"{name}.weight_shape in {header.file} holds {values}, but two positive sizes "
                "are expected. Save the model again."
            )


def _missing(name: str, tensor: str, layer: Layer) -> CheckpointError:
    return CheckpointError(
        f"{name}.{tensor} is missing; the layer has {', '.join(sorted(layer))}. Add the tensor, "
        "or correct the config if the layer has another scheme."
    )


def _unruled(name: str, layer: Layer, stored: set[str]) -> CheckpointError:
    return CheckpointError(
        f"{name} is stored quantised (it has {', '.join(sorted(stored))} in "
        f"{next(iter(layer.values())).file}), but the config leaves it in 16 bits. Take it off "
        "the config's list of skipped layers, or save the model again."
    )


def _words(spec: SchemeSpec) -> str:
    weight = spec.weight
    kind = "symmetric" if weight.symmetric else "asymmetric"
    order = ", act_order" if weight.act_order else ""
    return (
        f"{spec.dialect} {spec.variant}, {weight.bits} bits, {kind}, "
        f"group_size {weight.group_size}{order}"
    )
