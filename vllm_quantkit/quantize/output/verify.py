"""What was written is read back: every layer's weight must be the one that was measured."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit._safetensors import TensorHeader, read_headers, read_quantization_config
from vllm_quantkit.checkpoint import audit
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.formats import CheckpointTensor, Role, get_format
from vllm_quantkit.quantize.output.checkpoint import decoded_weight
from vllm_quantkit.quantize.output.records import BlockRecord
from vllm_quantkit.spec import SchemeSpec

INPUT_ROLES = (Role.INPUT_SCALE, Role.INPUT_ZERO)

ROWS = 64
"""Rows dequantised at a time."""


def weight_digest(weight: Tensor | QuantizedWeight) -> str:
    """SHA-256 of the weight's float32 bytes, row by row; of codes, of what they stand for.

    Args:
        weight: float [N, K], or codes.
    """
    digest = hashlib.sha256()
    rows = len(weight.codes if isinstance(weight, QuantizedWeight) else weight)
    for start in range(0, rows, ROWS):
        block = _rows(weight, slice(start, start + ROWS)).contiguous()
        digest.update(block.cpu().numpy().tobytes())
    return digest.hexdigest()


def read_layer(
    folder: Path,
    layer: str,
    scheme: SchemeSpec,
    headers: Mapping[str, TensorHeader] | None = None,
) -> QuantizedWeight:
    """A layer of a checkpoint, as a reader of its dialect understands it.

    Args:
        folder: the checkpoint.
        layer: its name there.
        scheme: how it is stored.
        headers: of the layer's tensors by their name behind the layer's; None reads them.

    Raises:
        CheckpointError: a tensor is missing, misshaped or mistyped, or cannot be decoded.
    """
    if headers is None:
        headers = _by_layer(read_headers(folder)).get(layer, {})
    stored = {name: _read(header) for name, header in headers.items()}
    return decode_layer(stored, layer, scheme)[0]


def decode_layer(
    stored: Mapping[str, Tensor], layer: str, scheme: SchemeSpec
) -> tuple[QuantizedWeight, dict[Role, Tensor]]:
    """A layer's codes, and INPUT_SCALE and INPUT_ZERO where its activations are static.

    Args:
        stored: its tensors, by their names behind the layer's; others are not looked at.
        layer: its name, for errors.
        scheme: how it is stored.

    Raises:
        CheckpointError: a tensor is missing, misshaped or mistyped, or cannot be decoded.
    """
    fmt = get_format(scheme.dialect)
    if fmt.codes_name(scheme) not in stored:
        raise CheckpointError(f"{layer}.{fmt.codes_name(scheme)} is missing.")
    size = None
    if "weight_shape" in stored:
        N, K = stored["weight_shape"].tolist()
        size = N, K
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    shape = fmt.infer_shape(scheme, shapes, size)
    values = {
        tensor.role: _decode(tensor, stored, layer)
        for tensor in fmt.tensors(scheme, shape)
        if tensor.name in stored or not tensor.optional
    }
    inputs = {role: values[role] for role in INPUT_ROLES if role in values}
    return decoded_weight(values, scheme.weight), inputs


def verify_checkpoint(
    folder: Path, records: Iterable[BlockRecord], layers: Mapping[str, SchemeSpec]
) -> None:
    """The config says what the files hold, and every layer has the digest in its record.

    One layer is read at a time.

    Args:
        folder: a finished checkpoint.
        records: what was noted when the layers were quantised.
        layers: every quantised layer's name to its scheme.

    Raises:
        CheckpointError: names the first layer that differs, or that has no digest.
        ConfigError, UnsupportedScheme: the folder's config cannot be read.
    """
    config = read_quantization_config(folder)
    headers = read_headers(folder)
    found = audit(headers, get_format(str(config["quant_method"])).parse(config))
    digests = {layer.name: layer.digest for record in records for layer in record.layers}
    own = _by_layer(headers)
    for name, scheme in layers.items():
        stored = found.quantised.get(name)
        if stored is None or stored.spec != scheme:
            seen = stored.spec.describe() if stored else "16 bits"
            raise _differs(folder, name, f"its config says {seen}, not {scheme.describe()}")
        if not digests.get(name):
            raise _differs(folder, name, "no digest was noted when it was quantised")
        if weight_digest(read_layer(folder, name, scheme, own[name])) != digests[name]:
            raise _differs(folder, name, "its weight is not the one that was measured")


def _by_layer(headers: Mapping[str, TensorHeader]) -> dict[str, dict[str, TensorHeader]]:
    found: dict[str, dict[str, TensorHeader]] = defaultdict(dict)
    for name, header in headers.items():
        layer, _, tensor = name.rpartition(".")
        found[layer][tensor] = header
    return found


def _rows(weight: Tensor | QuantizedWeight, rows: slice) -> Tensor:
    if isinstance(weight, Tensor):
        return weight[rows].float()
    own = (weight.codes[rows], weight.scales[rows], weight.zeros[rows])
    return replace(weight, codes=own[0], scales=own[1], zeros=own[2]).dequantize()


def _read(header: TensorHeader) -> Tensor:
    data = bytearray(header.read_bytes())
    if not data:
        return torch.empty(header.shape, dtype=header.dtype)
    return torch.frombuffer(data, dtype=header.dtype).reshape(header.shape)


def _decode(tensor: CheckpointTensor, stored: Mapping[str, Tensor], layer: str) -> Tensor:
    label = f"{layer}.{tensor.name}"
    if tensor.name not in stored or not tensor.admits(stored[tensor.name].shape):
        raise CheckpointError(f"{label} is missing, or not of shape {list(tensor.shape)}.")
    tensor.check_dtype(label, stored[tensor.name].dtype)
    try:
        return tensor.decode(stored[tensor.name])
    except ValueError as error:
        raise CheckpointError(f"{label} cannot be decoded: {error}.") from error


def _differs(folder: Path, layer: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is not what was quantised: {layer}: {why}. Delete the folder and quantise again."
    )
