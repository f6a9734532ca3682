"""quantkit checkpoints: all that a `WeightSpec` and an `ActivationSpec` can say, layer by layer.

For a layer with N outputs, K inputs and codes of b bits; G groups of inputs share a scale, and so
do h rows (`scale_rows`; all N where that is -1), which makes R = ceil(N / h) rows of scales:

    weight_codes[n, :]      = stream of codes[n, 0], codes[n, 1], ..   int32   [N, ceil(K b / 32)]
    weight_scale[r, g]      = the scale of rows r h .. and group g     float32 [R, G]
    weight_zero_point[r, :] = stream of zeros[r, 0], zeros[r, 1], ..   int32   [R, ceil(G b / 32)]
    weight_g_idx[k]         = the group of input k, else k // group_size       int32   [K]
    weight_shape            = (N, K)                                   int64   [2]
    input_scale             static activations                         float32 [1]
    input_zero_point        static activations, asymmetric             int8    [1]

In a stream, codes follow each other without gaps, least significant bit first: bits b i .. b i + b
- 1 of a row are code i, and 32 codes of 3 bits fill 3 words. The end of a row's last word is 0. So
every width takes just its bits: 3.0, 5.0, 6.0 bits a weight, where words of whole codes take 3.2,
5.33, 6.4. W[n, k] = scale (code - zero) for integers, scale * value(code) for floats and code
books, see `quantkit_kernels.code_types`. Zero-points exist where `symmetric` is false,
`weight_g_idx` where `act_order` is true.

The config:

    {"quant_method": "quantkit", "version": 1, "groups": [
      {"layers": [..], "weight": {"bits": .., "group_size": .., "symmetric": .., "act_order": ..,
       "code_type": .., "scale_rows": ..}, "activation": null or {"code": .., "dynamic": .., ..}}]}

An entry of `layers` is a whole name, or `re:` and a regular expression that is matched from the
name's start. The first group that lists a layer has it; layers that no group lists are in 16 bits,
the head among them.

vLLM with this plugin serves such a checkpoint without a flag: the method `quantkit` is registered
under the name that the config gives. Nothing else reads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.code_types import CODE_BOOKS, FLOAT8_DTYPES
from quantkit_kernels.packing import pack_stream, stream_words, unpack_stream
from vllm_quantkit.formats._compressed_tensors_packed import order_tensors, size_of
from vllm_quantkit.formats._compressed_tensors_plain import encode_input_zero
from vllm_quantkit.formats._eight_bit import (
    gather_rows,
    number_tensor,
    scale_tensor,
    spread_rows,
    table_shape,
)
from vllm_quantkit.formats._layout import check_below, unpack_rows
from vllm_quantkit.formats._patterns import compact
from vllm_quantkit.formats._quantkit_config import DIALECT, VERSION, QuantkitFields
from vllm_quantkit.formats._written import cannot_store
from vllm_quantkit.formats.base import CheckpointTensor, Role
from vllm_quantkit.spec import (
    ALL_ROWS,
    PER_CHANNEL,
    ActivationSpec,
    LayerRules,
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

CODES = "weight_codes"
TENSORS = (
    CODES,
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
    "input_scale",
    "input_zero_point",
)
COMPANIONS = ()


def parse(config: Mapping[str, Any]) -> LayerRules:
    """Each group's scheme for the layers it lists, 16 bits for all others.

    Raises:
        ConfigError: a key is missing, has the wrong type or a value nothing can mean.
        UnsupportedScheme: a later version.
    """
    return QuantkitFields.read(config).rules()


def codes_name(spec: SchemeSpec) -> str:
    """`weight_codes`."""
    return CODES


def tensors(spec: SchemeSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    """Codes, scales and shape, and where the spec has them zeros, order and static scales.

    Raises:
        UnsupportedScheme: bits that the code type does not have.
    """
    _check_bits(spec)
    weight, N, K = spec.weight, shape.out_features, shape.in_features
    codes = CheckpointTensor(
        CODES,
        Role.CODES,
        (N, stream_words(K, weight.bits)),
        (torch.int32,),
        partial(decode_codes, bits=weight.bits, length=K),
        partial(encode_codes, bits=weight.bits),
    )
    size = CheckpointTensor("weight_shape", Role.SHAPE, (2,), (torch.int64,), size_of, size_of)
    scales = scale_tensor("weight_scale", weight, shape, (table_shape(weight, shape),))
    scales = replace(scales, dtypes=(torch.float32,))
    zeros = () if weight.symmetric else (_zero_tensor(weight, shape),)
    return (codes, size, scales, *zeros, *order_tensors(weight, K), *_static_tensors(spec))


def infer_shape(
    spec: SchemeSpec, shapes: Mapping[str, tuple[int, ...]], stored: tuple[int, int] | None = None
) -> LayerShape:
    """N and K: what `weight_shape` holds, else the most that the codes' words can."""
    if stored is not None:
        return LayerShape(out_features=stored[0], in_features=stored[1])
    N, words = shapes[CODES]
    return LayerShape(out_features=N, in_features=words * 32 // spec.weight.bits)


def scheme(weight: WeightSpec, activation: ActivationSpec | None) -> SchemeSpec:
    """Every scheme that quantkit multiplies: 16-bit activations, or 8-bit times 8-bit.

    Raises:
        UnsupportedScheme: bits that the code type does not have, or activations that these weights
            are not multiplied with.
    """
    spec = SchemeSpec(dialect=DIALECT, weight=weight, activation=activation)
    _check_bits(spec)
    if activation is not None and not _multiplied(weight, activation):
        holds = (
            "8-bit activations beside symmetric 8-bit weights of their kind, groups in order, "
            "integers with a scale per channel"
        )
        raise cannot_store(DIALECT, weight, activation, holds)
    return spec


def render(layers: Mapping[str, SchemeSpec], ignore: tuple[str, ...]) -> dict[str, Any]:
    """A quantkit config: a group for each scheme; nothing needs to be ignored.

    Raises:
        UnsupportedScheme: bits that a code type does not have.
    """
    groups: dict[SchemeSpec, list[str]] = defaultdict(list)
    for name, spec in layers.items():
        _check_bits(spec)
        groups[spec].append(name)
    everything = (*layers, *ignore)
    return {
        "quant_method": DIALECT,
        "version": VERSION,
        "groups": [
            {
                "layers": list(compact(names, everything)),
                "weight": spec.weight.model_dump(),
                "activation": spec.activation.model_dump() if spec.activation else None,
            }
            for spec, names in groups.items()
        ],
    }


def decode_codes(words: Tensor, bits: int, length: int) -> Tensor:
    """codes[n, k] = field k of the stream words[n]: int32 [N, W] to uint8 [N, length]."""
    return unpack_rows(unpack_stream, words, bits, length)


def encode_codes(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `decode_codes`."""
    check_below(codes, 2**bits, "quantkit codes")
    return pack_stream(codes, bits)


def decode_zeros(words: Tensor, bits: int, rows: int, groups: int, height: int) -> Tensor:
    """zeros[n, g] = field g of the stream words[n // height]: int32 [R, W] to uint8 [rows, G]."""
    return spread_rows(unpack_stream(words, bits, groups), rows, groups, height)


def encode_zeros(zeros: Tensor, bits: int, height: int) -> Tensor:
    """Inverse of `decode_zeros`."""
    check_below(zeros, 2**bits, "quantkit zero-points")
    return pack_stream(gather_rows(zeros, height), bits)


def _zero_tensor(weight: WeightSpec, shape: LayerShape) -> CheckpointTensor:
    N, bits = shape.out_features, weight.bits
    rows, groups = table_shape(weight, shape)
    height = N if weight.scale_rows == ALL_ROWS else weight.scale_rows
    return CheckpointTensor(
        "weight_zero_point",
        Role.ZEROS,
        (rows, stream_words(groups, bits)),
        (torch.int32,),
        partial(decode_zeros, bits=bits, rows=N, groups=groups, height=height),
        partial(encode_zeros, bits=bits, height=height),
    )


def _static_tensors(spec: SchemeSpec) -> tuple[CheckpointTensor, ...]:
    if spec.activation is None or spec.activation.dynamic:
        return ()
    scale = number_tensor("input_scale", Role.INPUT_SCALE)
    if spec.activation.symmetric:
        return (scale,)
    zero = number_tensor("input_zero_point", Role.INPUT_ZERO)
    return (scale, replace(zero, dtypes=(torch.int8,), encode=encode_input_zero))


def _check_bits(spec: SchemeSpec) -> None:
    weight = spec.weight
    bits = {**dict.fromkeys(FLOAT8_DTYPES, 8), **dict.fromkeys(CODE_BOOKS, 4)}
    if weight.bits != bits.get(weight.code_type, weight.bits) or (
        weight.code_type != "int" and not weight.symmetric
    ):
        holds = "integers of 2 to 8 bits, symmetric floats of 8 and code books of 4"
        raise cannot_store(DIALECT, weight, spec.activation, holds)


def _multiplied(weight: WeightSpec, activation: ActivationSpec) -> bool:
    """True where there is a product of these 8-bit weights and activations."""
    integers = weight.code_type == "int" and activation.code == "int8"
    floats = weight.code_type in FLOAT8_DTYPES and activation.code == "e4m3"
    if weight.bits != 8 or not weight.symmetric or weight.act_order or not (integers or floats):
        return False
    if integers:
        return weight.group_size == PER_CHANNEL and weight.scale_rows in (1, ALL_ROWS)
    return activation.group_size <= 0 or weight.group_size in (PER_CHANNEL, activation.group_size)
