"""Checks that a checkpoint's tensors fit its config, by headers alone, before weights are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from vllm_quantkit._safetensors import TensorHeader, read_headers, read_quantization_config
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.formats import FORMATS, CheckpointTensor, get_format
from vllm_quantkit.formats.bitsandbytes import QUANT_STATE, read_state
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

SHARED = frozenset({WEIGHT, "input_scale", "input_zero_point", "input_scale_ub"})
"""Tensors of quantised layers that layers in 16 bits may have, too."""

BESIDE = frozenset(
    {
        *("bias", "q_scale", "k_scale", "v_scale", "kv_scale", "prob_scale", "output_scale"),
        "k_zero_point",
    }
)
"""Tensors that may lie beside a quantised layer's own: biases, and scales of the KV cache."""

ON_ARRIVAL = "16-bit"
"""The dialect of layers that are stored in 16 bits and quantised when they are loaded."""

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

    A layer is stored quantised if it has a tensor that only such layers have, or a `weight` of 8
    bits. With rules that quantise on arrival, every linear layer counts as quantised.

    Raises:
        CheckpointError: a tensor is missing, unexpected, misshaped or mistyped, or a layer is
            stored quantised although the rules leave it in 16 bits.
        UnsupportedScheme: a layer's size is one that its dialect cannot store.
    """
    quantised, plain = {}, []
    for name, layer in _layers(headers).items():
        spec, stored = rules.scheme_for(name), _stored_quantised(layer)
        if stored == {"scales"} and len(layer["scales"].shape) == 1:
            continue  # AutoAWQ's scaled activation, such as `mlp.act`
        if stored and spec is None:
            raise _unruled(name, layer, stored)
        if spec is None:
            continue
        on_arrival = spec.dialect == ON_ARRIVAL and _is_linear(name, layer)
        if stored or on_arrival:
            quantised[name] = QuantisedLayer(spec, _check_layer(name, layer, spec))
        elif _is_linear(name, layer):
            plain.append(name)
    return CheckpointAudit(quantised, tuple(plain))


@cache
def _telling_names() -> frozenset[str]:
    """Names of tensors that only layers stored quantised have."""
    formats = [get_format(dialect) for dialect in FORMATS]
    return frozenset(name for fmt in formats for name in (*fmt.TENSORS, *fmt.COMPANIONS)) - SHARED


def _stored_quantised(layer: Layer) -> set[str]:
    """The tensors that tell that a layer is stored quantised."""
    weight = layer.get(WEIGHT)
    eight_bits = weight is not None and weight.dtype.itemsize == 1 and weight.dtype != torch.bool
    return {*(_telling_names() & layer.keys()), *((WEIGHT,) if eight_bits else ())}


def _layers(headers: Mapping[str, TensorHeader]) -> dict[str, dict[str, TensorHeader]]:
    companions = {name for dialect in FORMATS for name in get_format(dialect).COMPANIONS}
    layers: dict[str, dict[str, TensorHeader]] = defaultdict(dict)
    for name, header in headers.items():
        layer, _, tensor = name.rpartition(".")
        parent, dot, inner = name.rpartition(f".{WEIGHT}.")
        if dot and f"{WEIGHT}.{inner}" in companions:
            layer, tensor = parent, f"{WEIGHT}.{inner}"
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
    dialect = get_format(spec.dialect)
    expected = dialect.tensors(spec, shape)
    for tensor in expected:
        _check_tensor(name, layer, tensor)
    names = {tensor.name for tensor in expected}
    unexpected = layer.keys() - names - BESIDE - set(dialect.COMPANIONS)
    if spec.dialect == ON_ARRIVAL:
        # Models decide what else a layer in 16 bits has.
        unexpected &= _telling_names()
    if unexpected:
        raise CheckpointError(
            f"{name}.{min(unexpected)} is unexpected: a layer with {_words(spec)} holds "
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
    label = f"{name}.{tensor.name} in {header.file}"
    if not tensor.admits(header.shape):
        allowed = " or ".join(str(list(shape)) for shape in tensor.shapes)
        raise CheckpointError(
            f"{label} has shape {list(header.shape)}, but {allowed} is expected. Correct the "
            "config (bits, group size, format) or save the model again."
        )
    tensor.check_dtype(label, header.dtype)


def _infer_shape(name: str, layer: Layer, spec: SchemeSpec) -> LayerShape:
    dialect = get_format(spec.dialect)
    codes = dialect.codes_name(spec)
    if codes not in layer:
        raise _missing(name, codes, layer)
    if len(layer[codes].shape) != 2 or 0 in layer[codes].shape:
        raise CheckpointError(
            f"{name}.{codes} in {layer[codes].file} has shape {list(layer[codes].shape)}, but "
            "a matrix is expected. Only linear layers are served quantised; save the model again "
            "with this one in 16 bits."
        )
    shapes = {tensor: header.shape for tensor, header in layer.items()}
    try:
        return dialect.infer_shape(spec, shapes, _stored_size(name, layer))
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _stored_size(name: str, layer: Layer) -> tuple[int, int] | None:
    """(N, K) as a tensor of the layer holds it, if it has one that can be read."""
    for tensor, header in layer.items():
        if tensor == "weight_shape":
            size = _size_of_integers(header)
        elif tensor.startswith(QUANT_STATE):
            size = _size_of_json(f"{name}.{tensor}", header)
        else:
            continue
        match size:
            case [int(N), int(K)] if N > 0 and K > 0:
                return N, K
            case []:
                return None
            case values:
                raise CheckpointError(
                    f"{name}.{tensor} in {header.file} holds {values}, but two positive sizes "
                    "are expected. Save the model again."
                )
    return None


def _size_of_integers(header: TensorHeader) -> list[int]:
    if header.shape != (2,) or header.dtype not in (torch.int64, torch.int32):
        return []
    return header.read_integers()


def _size_of_json(label: str, header: TensorHeader) -> list[int]:
    data = header.read_bytes()
    try:
        return (read_state(data).shape or []) if data else []
    except ValueError as error:
        raise CheckpointError(f"{label} in {header.file} cannot be read: {error}.") from None


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
    kind = "symmetric" if spec.weight.symmetric else "asymmetric"
    order = ", act_order" if spec.weight.act_order else ""
    return f"{spec.dialect} {spec.variant}".strip() + f", {kind}, {spec.describe()}{order}"
