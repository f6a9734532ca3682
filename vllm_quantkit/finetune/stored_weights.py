"""The tensors of a checkpoint, read one layer at a time: quantised weights as codes and scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.checkpoint import QuantisedLayer, TensorHeader
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.formats import Role
from vllm_quantkit.quantize.output.checkpoint import decoded_weight
from vllm_quantkit.schemes import LinearScheme
from vllm_quantkit.schemes.linear import linear_scheme
from vllm_quantkit.spec import LayerShape

Headers = Mapping[str, TensorHeader]


def read_tensors(headers: Headers, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors called `names`."""
    tensors = {}
    for name in names:
        with safe_open(headers[name].file, "pt") as file:
            tensors[name] = file.get_tensor(name)
    return tensors


def read_weight(
    headers: Headers, name: str, layer: QuantisedLayer, *, transposed: bool
) -> QuantizedWeight:
    """The weight of a checkpoint layer, decoded, or quantised if it is stored in 16 bits.

    Args:
        headers: the checkpoint's.
        name: the layer's.
        layer: what the audit found it to be.
        transposed: True where a weight in 16 bits is stored as [K, N].

    Raises:
        CheckpointError: the tensors cannot be decoded, or a scale is not finite.
    """
    prefix = f"{name}."
    full_names = [full for full in headers if full.startswith(prefix)]
    stored = {
        full.removeprefix(prefix): tensor
        for full, tensor in read_tensors(headers, full_names).items()
    }
    scheme = linear_scheme(layer.spec)
    try:
        parts = _canonical(scheme, layer.shape, stored)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be decoded: {error}") from error
    if Role.WEIGHT in parts:
        dense = parts[Role.WEIGHT]
        return scheme.quantize(dense.T.contiguous() if transposed else dense)
    _refuse_infinite_scales(name, parts[Role.SCALES])
    return decoded_weight(parts, layer.spec.weight)


def _canonical(
    scheme: LinearScheme, shape: LayerShape, stored: Mapping[str, Tensor]
) -> dict[Role, Tensor]:
    if scheme.assembles:
        return scheme.assemble(stored, shape)
    return {
        tensor.role: tensor.decode(stored[tensor.name])
        for tensor in scheme.tensors(shape)
        if tensor.name in stored
    }


def _refuse_infinite_scales(name: str, scales: Tensor) -> None:
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(
            f"{name} has a scale that is not finite. The checkpoint is damaged: download it again, "
            f"or save the model again."
        )
