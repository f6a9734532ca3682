"""What a layer becomes in a checkpoint, and a source folder with some tensors exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats import CheckpointTensor, Role, get_format
from vllm_quantkit.formats._layout import representable
from vllm_quantkit.quantize.methods.rtn import group_width
from vllm_quantkit.quantize.output.records import BlockRecord
from vllm_quantkit.quantize.output.workspace import Workspace
from vllm_quantkit.spec import LayerShape, SchemeSpec, WeightSpec

Exchange = Mapping[str, Mapping[str, Tensor]]
"""Name of a source tensor to the tensors, by full name, that take its place."""


def encode_layer(
    weight: QuantizedWeight,
    scheme: SchemeSpec,
    inputs: Mapping[Role, Tensor] | None = None,
    *,
    scale_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors of a layer as its dialect stores them, by their name behind the layer's.

    Args:
        weight: the layer's codes.
        scheme: how they are stored.
        inputs: INPUT_SCALE and INPUT_ZERO of static activations.
        scale_dtype: of the weight's scales, see `scale_dtype_for`; None for the dialect's usual.

    Raises:
        ValueError: a scale that `scale_dtype` cannot hold, a dtype that the dialect does not have,
            or a code or zero-point that needs more bits.
    """
    out_features, in_features = weight.codes.shape
    canonical = {
        Role.CODES: weight.codes,
        Role.SCALES: weight.scales,
        Role.ZEROS: weight.zeros,
        Role.GROUP_INDEX: weight.group_index,
        Role.SHAPE: torch.tensor([out_features, in_features]),
        **(inputs or {}),
    }
    shape = LayerShape(out_features=out_features, in_features=in_features)
    stored = get_format(scheme.dialect).tensors(scheme, shape)
    return {
        tensor.name: _encode(tensor, canonical[tensor.role], scale_dtype)
        for tensor in stored
        if tensor.role in canonical or not tensor.optional
    }


def decoded_weight(parts: Mapping[Role, Tensor], spec: WeightSpec) -> QuantizedWeight:
    """The weight that canonical tensors make: zero-points in the middle and groups in order, unless
    they are given.

    Args:
        parts: CODES and SCALES, and where they are stored ZEROS and GROUP_INDEX.
        spec: the numerics.
    """
    codes, scales = parts[Role.CODES], parts[Role.SCALES].float()
    in_features = codes.shape[1]
    in_order = torch.arange(in_features) // group_width(spec, in_features)
    zeros = parts.get(Role.ZEROS, torch.full_like(scales, spec.default_zero))
    index = parts.get(Role.GROUP_INDEX, in_order)
    return QuantizedWeight(
        codes, scales, zeros.to(torch.uint8), index.to(torch.int32), spec.bits, spec.code_type
    )


def scale_dtype_for(scheme: SchemeSpec, stored_dtype: torch.dtype) -> torch.dtype:
    """What the scales of a layer are stored in; its codes must be made for scales rounded to it.

    `pack-quantized` takes the dtype of the model's other tensors: engines and transformers hold
    such scales in the activations' dtype, and would round others when they load them. AWQ and GPTQ
    have float16 by definition, so that engines in bfloat16 may round theirs. All others have
    float32, which their readers keep.

    Args:
        scheme: of the layer.
        stored_dtype: of the model's other tensors.
    """
    if scheme.dialect in ("awq", "gptq"):
        return torch.float16
    if scheme.dialect == "compressed-tensors" and scheme.is_packed:
        return stored_dtype
    return torch.float32


def quantization_config(
    layers: Mapping[str, SchemeSpec], ignore: tuple[str, ...]
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint, read back: it says what is stored, layer by layer.

    Args:
        layers: every quantised layer's name in the checkpoint, to its scheme, all of one dialect.
        ignore: names of all other linear layers.

    Raises:
        UnsupportedScheme: the dialect cannot say it; names the first layer it is wrong about.
    """
    dialects = dict.fromkeys(scheme.dialect for scheme in layers.values())
    if len(dialects) != 1:
        raise UnsupportedScheme(
            f"a checkpoint has one dialect, but its layers have {', '.join(dialects) or 'none'}. "
            "Quantise at least one layer, and all to one dialect."
        )
    fmt = get_format(next(iter(dialects)))
    config = fmt.render(layers, ignore)
    rules = fmt.parse(config)
    expected: dict[str, SchemeSpec | None] = {**dict.fromkeys(ignore), **layers}
    for name, scheme in expected.items():
        if rules.scheme_for(name) != scheme:
            raise UnsupportedScheme(
                f"a config of the dialect {next(iter(dialects))!r} cannot say that {name} has "
                f"{scheme.describe() if scheme else '16 bits'} beside the other layers. Quantise "
                "it as its neighbours, or use the dialect 'quantkit'."
            )
    return config


def exchange_layers(
    layers: Mapping[str, QuantizedWeight],
    scheme: SchemeSpec,
    inputs: Mapping[str, Mapping[Role, Tensor]] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """`<layer>.weight` to the layer's encoded tensors, for every layer.

    Args:
        layers: layer to its codes.
        scheme: how they are stored.
        inputs: layer to INPUT_SCALE and INPUT_ZERO of its static activations.
    """
    stored = {
        layer: encode_layer(weight, scheme, (inputs or {}).get(layer))
        for layer, weight in layers.items()
    }
    return {
        f"{layer}.weight": {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
        for layer, tensors in stored.items()
    }


def write_checkpoint(
    source: Path, out: Path, exchange: Exchange, config: Mapping[str, Any]
) -> None:
    """`out` = `source` with the tensors that `exchange` names replaced and config.json updated.

    `out` appears in one step when it is complete.

    Args:
        source: a transformers model folder with safetensors weights.
        out: must not exist, nor a folder `<out>.partial`.
        exchange: what replaces which tensor.
        config: keys to set in config.json.

    Raises:
        CheckpointError: `out` exists, `source` has no safetensors or lacks a tensor to replace, or
            the disk is full.
    """
    tensors = {name: tensor for new in exchange.values() for name, tensor in new.items()}
    with Workspace.create(out, {}, resume=False) as workspace:
        try:
            workspace.write_block(0, tensors, BlockRecord(index=0, layers=()))
            workspace.finish(source, exchange.keys(), config, {})
        except BaseException:
            workspace.discard()
            raise


def _encode(tensor: CheckpointTensor, value: Tensor, scale_dtype: torch.dtype | None) -> Tensor:
    if tensor.role is not Role.SCALES:
        return tensor.encode(value).contiguous()
    dtype = scale_dtype or tensor.dtypes[0]
    if dtype not in tensor.dtypes:
        allowed = ", ".join(str(one) for one in tensor.dtypes)
        raise ValueError(f"{tensor.name} is stored in {allowed}, but {dtype} was asked for")
    return tensor.encode(representable(value, dtype)).contiguous()
