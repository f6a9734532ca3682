"""fp8 checkpoints, as AutoFP8, DeepSeek and transformers write them: W = scale * float8.

    weight                                               float8_e4m3fn or float8_e5m2  [N, K]
    weight_scale              one scale                  float   [] or [1]
                              or one per output channel  float   [N, 1] or [N]
    weight_scale_inv[r, c]    with `weight_block_size` [h, w], the scale of rows r h .. and
                              columns c w ..: despite its name, it is multiplied
                                                         float or float8_e8m0fnu
                                                                 [ceil(N/h), ceil(K/w)]
    input_scale               where `activation_scheme` is static
                                                         float   [] or [1]

Activations are E4M3: with one static scale, with a dynamic scale per token, or, beside blocks, with
a dynamic scale per token and w channels. Which shape `weight_scale` has is known from the tensors
alone; decoded, it is spread over the rows either way.

Names: an entry of `ignored_layers` or `modules_to_not_convert` is a module, wherever in the tree,
with all inside it, or `re:` and a regular expression. The head stays in 16 bits.

Sources: https://github.com/neuralmagic/AutoFP8 (`auto_fp8/quantize.py`);
https://arxiv.org/abs/2412.19437 (DeepSeek-V3, section 3.3.2);
https://github.com/huggingface/transformers (`utils/quantization_config.py`, FineGrainedFP8Config).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantkit_kernels.code_types import FLOAT8_DTYPES
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats._eight_bit import (
    ONE,
    SCALE_DTYPES,
    number_tensor,
    per_channel_shapes,
    scale_tensor,
    table_shape,
    weight_tensor,
)
from vllm_quantkit.formats._fp8_config import Fp8Fields, skip_list
from vllm_quantkit.formats._written import ANY_LAYER, confirmed, only_scheme
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

TENSORS = ("weight", "weight_scale", "weight_scale_inv", "input_scale")
COMPANIONS = ()


def parse(config: Mapping[str, Any]) -> LayerRules:
    """One scheme for all layers but the head and those of the skip lists.

    Raises:
        ConfigError: a key has the wrong type or a value nothing can mean.
        UnsupportedScheme: the config is well formed but not served; says what to do.
    """
    return Fp8Fields.read(config).rules()


def codes_name(spec: SchemeSpec) -> str:
    """`weight`."""
    return "weight"


def tensors(spec: SchemeSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    """weight, weight_scale or weight_scale_inv, and input_scale.

    Layers with dynamic activations may have an input_scale, too; it is not used.

    Raises:
        UnsupportedScheme: the spec is one that the dialect cannot store.
    """
    _check_storable(spec)
    weight = spec.weight
    if weight.group_size == PER_CHANNEL:
        channels = per_channel_shapes(shape)
        shapes = (*ONE, *channels) if weight.scale_rows == ALL_ROWS else channels
        scales = scale_tensor("weight_scale", weight, shape, shapes)
    else:
        dtypes = (*SCALE_DTYPES, torch.float8_e8m0fnu)
        table = (table_shape(weight, shape),)
        scales = scale_tensor("weight_scale_inv", weight, shape, table, dtypes)
    static = spec.activation is not None and not spec.activation.dynamic
    role = Role.INPUT_SCALE if static else Role.MARK
    return (
        weight_tensor(weight, shape),
        scales,
        number_tensor("input_scale", role, optional=not static),
    )


def infer_shape(
    spec: SchemeSpec, shapes: Mapping[str, tuple[int, ...]], stored: tuple[int, int] | None = None
) -> LayerShape:
    """N and K from the shape of `weight`."""
    N, K = shapes["weight"]
    return LayerShape(out_features=N, in_features=K)


def scheme(weight: WeightSpec, activation: ActivationSpec | None) -> SchemeSpec:
    """Blocks with dynamic activations, or one scale with activations of one or per token.

    Raises:
        ConfigError, UnsupportedScheme: other numerics.
    """
    spec = SchemeSpec(dialect="fp8", weight=weight, activation=activation)
    return confirmed(spec, parse(render({ANY_LAYER: spec}, ())))


def render(layers: Mapping[str, SchemeSpec], ignore: tuple[str, ...]) -> dict[str, Any]:
    """An `fp8` config; `ignore` holds names of modules. The head always stays in 16 bits.

    Raises:
        UnsupportedScheme: several schemes, or one that the dialect cannot store.
    """
    spec = only_scheme("fp8", layers)
    _check_storable(spec)
    static = spec.activation is not None and not spec.activation.dynamic
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "static" if static else "dynamic",
        "fmt": spec.weight.code_type,
        "modules_to_not_convert": skip_list(ignore),
    }
    if spec.weight.group_size != PER_CHANNEL:
        config["weight_block_size"] = [spec.weight.scale_rows, spec.weight.group_size]
    return config


def _check_storable(spec: SchemeSpec) -> None:
    weight = spec.weight
    per_row_block = weight.scale_rows != ALL_ROWS or weight.group_size == PER_CHANNEL
    if weight.code_type not in FLOAT8_DTYPES or weight.bits != 8 or not per_row_block:
        raise UnsupportedScheme(
            f"fp8 cannot store {weight.bits} bits of {weight.code_type!r} with group_size "
            f"{weight.group_size} and scale_rows {weight.scale_rows}: it holds 8-bit floats with a "
            "scale per tensor, channel or block. Use the dialect 'compressed-tensors'."
        )
