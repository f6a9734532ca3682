"""What every checkpoint dialect offers: parse a config, and list a layer's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_quantkit.spec import LayerRules, LayerShape, SchemeSpec


class Role(StrEnum):
    """What a checkpoint tensor means once decoded, for a layer with N outputs and K inputs."""

    CODES = "codes"  # uint8 [N, K], each below 2**bits
    SCALES = "scales"  # float32 [N, G]
    ZEROS = "zeros"  # uint8 [N, G], 0 .. 2**bits
    GROUP_INDEX = "group_index"  # int32 [K], each in 0 .. G - 1
    SHAPE = "shape"  # int64 [2], must equal (N, K)
    INPUT_SCALE = "input_scale"  # float32 [1], the static scale of the activations
    INPUT_ZERO = "input_zero"  # float32 [1], their zero-point among codes -128 .. 127
    WEIGHT = "weight"  # float [N, K], to be quantised on arrival
    MARK = "mark"  # a constant that says how the others are stored; decode checks it


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a layer as the checkpoint stores it.

    Attributes:
        name: its name behind the layer's name, such as `qweight`.
        role: what it means.
        shape: its shape in the checkpoint.
        dtypes: the dtypes it may have there; the first is the one we write.
        decode: stored tensor to the role's canonical tensor.
        encode: the inverse.
        optional: True where a checkpoint may lack it and its default holds (symmetric
            zero-points, groups in order).
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    optional: bool = False


class Format(Protocol):
    """A dialect, as a module with these members.

    Attributes:
        TENSORS: every tensor name a quantised layer may have; the first holds the codes.
    """

    TENSORS: tuple[str, ...]

    def parse(self, config: Mapping[str, Any]) -> LayerRules:
        """Which scheme each layer has.

        Raises:
            ConfigError: a key is missing, has the wrong type or a value nothing can mean.
            UnsupportedScheme: the config is well formed but not served; says what to do.
        """

    def tensors(self, spec: SchemeSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
        """The tensors of a layer, for reading and for writing alike."""

    def infer_shape(
        self,
        spec: SchemeSpec,
        shapes: Mapping[str, tuple[int, ...]],
        stored: tuple[int, int] | None = None,
    ) -> LayerShape:
        """The size of a layer, from its tensors' shapes and the value of its SHAPE tensor.

        Args:
            spec: the layer's scheme.
            shapes: tensor name (such as `qweight`) to shape; holds at least `TENSORS[0]`.
            stored: (N, K) as a SHAPE tensor says, where the checkpoint has one.
        """

    def render(self, spec: SchemeSpec, ignore: tuple[str, ...]) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint with one scheme; `ignore` stays in 16 bits."""
