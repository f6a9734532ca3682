"""A checkpoint in 16 bits, whose layers are quantised on arrival: W as it is, [N, K].

Nothing is written in this dialect, and no config names it: the user's choice of method makes the
rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Never

import torch
from torch import Tensor

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats.base import CheckpointTensor, Role
from vllm_quantkit.spec import (
    ActivationSpec,
    LayerRules,
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

TENSORS = ("weight",)
COMPANIONS = ()

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def parse(config: Mapping[str, Any]) -> LayerRules:
    """There is no such config.

    Raises:
        UnsupportedScheme: always.
    """
    raise _unnamed()


def codes_name(spec: SchemeSpec) -> str:
    """`weight`."""
    return "weight"


def tensors(spec: SchemeSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    """The weight."""
    size = (shape.out_features, shape.in_features)
    return (CheckpointTensor("weight", Role.WEIGHT, size, DTYPES, as_stored, as_stored),)


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
    raise _unnamed()


def render(layers: Mapping[str, SchemeSpec], ignore: tuple[str, ...]) -> Never:
    """There is no such config.

    Raises:
        UnsupportedScheme: always.
    """
    raise _unnamed()


def as_stored(stored: Tensor) -> Tensor:
    """The tensor itself: it is read once, and a copy would double the memory it takes."""
    return stored


def _unnamed() -> UnsupportedScheme:
    return UnsupportedScheme(
        "a checkpoint in 16 bits has no quantization_config, and none is written for it. Choose "
        "how to quantise it with --quantization."
    )
