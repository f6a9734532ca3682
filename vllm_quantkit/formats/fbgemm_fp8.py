"""fbgemm_fp8 checkpoints, as Meta's Llama 3.1 405B has them: W = scale * E4M3, per channel.

    weight                            float8_e4m3fn  [N, K]
    weight_scale                      float          [N, 1]
    input_scale_ub    may be there    float          [] or [1]

Activations get a dynamic scale per token, made for no larger magnitude than `activation_scale_ub`;
`input_scale_ub` repeats that number and is only compared with it.

Names: an entry of `modules_to_not_convert` is a module, wherever in the tree, with all inside it,
or `re:` and a regular expression. The head stays in 16 bits.

Sources: https://github.com/huggingface/transformers (`integrations/fbgemm_fp8.py`);
https://arxiv.org/abs/2407.21783 (section 6.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import isclose
from typing import Any, Never

import torch
from torch import Tensor

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats._eight_bit import (
    decode_number,
    number_tensor,
    per_channel_shapes,
    scale_tensor,
    weight_tensor,
)
from vllm_quantkit.formats._fp8_config import FbgemmFields, skip_list
from vllm_quantkit.formats._written import not_written, only_scheme
from vllm_quantkit.formats.base import CheckpointTensor, Role
from vllm_quantkit.spec import (
    PER_CHANNEL,
    ActivationSpec,
    LayerRules,
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

TENSORS = ("weight", "weight_scale", "input_scale_ub")
COMPANIONS = ()

WEIGHT = WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True, code_type="e4m3")
"""The one kind of weight there is."""


def parse(config: Mapping[str, Any]) -> LayerRules:
    """One scheme for all layers but the head and those of the skip list.

    Raises:
        ConfigError: a key has the wrong type or a value nothing can mean.
    """
    return FbgemmFields.read(config).rules()


def codes_name(spec: SchemeSpec) -> str:
    """`weight`."""
    return "weight"


def tensors(spec: SchemeSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    """weight, weight_scale, and the bound that a layer may repeat.

    Raises:
        UnsupportedScheme: the spec is one that the dialect cannot store.
    """
    _check_storable(spec)
    bound = spec.activation.upper_bound if spec.activation else None
    return (
        weight_tensor(spec.weight, shape),
        scale_tensor("weight_scale", spec.weight, shape, per_channel_shapes(shape)),
        replace(
            number_tensor("input_scale_ub", Role.MARK, optional=True),
            decode=partial(check_bound, expected=bound),
        ),
    )


def infer_shape(
    spec: SchemeSpec, shapes: Mapping[str, tuple[int, ...]], stored: tuple[int, int] | None = None
) -> LayerShape:
    """N and K from the shape of `weight`."""
    N, K = shapes["weight"]
    return LayerShape(out_features=N, in_features=K)


def scheme(weight: WeightSpec, activation: ActivationSpec | None) -> Never:
    """Nothing is quantised to this dialect.

    Raises:
        UnsupportedScheme: always.
    """
    raise not_written("fbgemm_fp8")


def render(layers: Mapping[str, SchemeSpec], ignore: tuple[str, ...]) -> dict[str, Any]:
    """An `fbgemm_fp8` config; `ignore` holds names of modules. The head stays in 16 bits.

    Raises:
        UnsupportedScheme: several schemes, or one that the dialect cannot store.
    """
    spec = only_scheme("fbgemm_fp8", layers)
    _check_storable(spec)
    return {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": spec.activation.upper_bound if spec.activation else None,
        "modules_to_not_convert": skip_list(ignore),
    }


def check_bound(stored: Tensor, expected: float | None) -> Tensor:
    """The stored bound as float32 [1], if it is the config's.

    Raises:
        ValueError: it is another.
    """
    bound = decode_number(stored)
    # bfloat16 keeps 8 bits of a number.
    accuracy = max(torch.finfo(stored.dtype).eps, 1e-6)
    if expected is None or not isclose(float(bound), expected, rel_tol=accuracy):
        raise ValueError(
            f"it holds {float(bound)}, but the config's activation_scale_ub is {expected}; "
            "make them agree"
        )
    return bound


def _check_storable(spec: SchemeSpec) -> None:
    if spec.weight != WEIGHT:
        raise UnsupportedScheme(
            f"fbgemm_fp8 cannot store {spec.weight.bits} bits of {spec.weight.code_type!r} with "
            f"group_size {spec.weight.group_size} and scale_rows {spec.weight.scale_rows}: it "
            "holds E4M3 with a scale per channel. Use the dialect 'compressed-tensors'."
        )
