"""What every checkpoint dialect offers: parse a config, and list a layer's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.spec import (
    ActivationSpec,
    LayerRules,
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

FP8_FLOATS = {torch.float8_e4m3fn, torch.float8_e5m2}
"""8-bit floats that a config tells apart by the key `fmt`."""

FOREIGN_FLOATS = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
"""8-bit floats with another exponent bias, which no scheme multiplies."""


class Role(StrEnum):
    """What a checkpoint tensor means once decoded, for a layer with N outputs and K inputs."""

    CODES = "codes"  # uint8 [N, K], each below 2**bits
    SCALES = "scales"  # float32 [N, G]
    ZEROS = "zeros"  # uint8 [N, G], 0 .. 2**bits
    GROUP_INDEX = "group_index"  # int32 [K], each in 0 .. G - 1
    SHAPE = "shape"  # int64 [2], must equal (N, K)
    INPUT_SCALE = "input_scale"  # float32 [1], the static scale of the activations
    INPUT_ZERO = "input_zero"  # float32 [1], their zero-point among codes -128 .. 127
    INPUT_ABSMAX = "input_absmax"  # float32 [K], the largest |x| of each channel; statistics
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
        encode: the inverse; scales stay in the dtype that they come in.
        optional: True where a checkpoint may lack it and its default holds (symmetric
            zero-points, groups in order).
        other_shapes: further shapes it may have in a checkpoint; `shape` is the one we write.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    optional: bool = False
    other_shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Every shape that a checkpoint may store it in."""
        return (self.shape, *(shape for shape in self.other_shapes if shape != self.shape))

    def admits(self, shape: Sequence[int]) -> bool:
        """True where a checkpoint may store the tensor in this shape."""
        return tuple(shape) in self.shapes

    def check_dtype(self, label: str, found: torch.dtype) -> None:
        """Pass the dtypes that the tensor may have in a checkpoint.

        Raises:
            CheckpointError: `found` is none of them; says how to convert it where that is known.
        """
        if found in self.dtypes:
            return
        allowed = " or ".join(str(dtype) for dtype in self.dtypes)
        fix = "Correct the config's quant_method and format, or save the model again."
        if {found, *self.dtypes} == FP8_FLOATS:
            fix = "Set 'fmt' to the weights' float if quant_method is 'fp8', else save them again."
        if found in FOREIGN_FLOATS:
            fix = (
                f"Its bits mean half of what they do in {_usual(found)}: cast the values to "
                f"{_usual(found)} (not the bits), and keep the scale."
            )
        raise CheckpointError(f"{label} has dtype {found}, but {allowed} is expected. {fix}")


class Format(Protocol):
    """A dialect, as a module with these members.

    Attributes:
        TENSORS: every tensor name a quantised layer may have.
        COMPANIONS: names, dots included, of tensors that make sense only together with one of
            `TENSORS`; the dialect's `assemble` reads them.
    """

    TENSORS: tuple[str, ...]
    COMPANIONS: tuple[str, ...]

    def parse(self, config: Mapping[str, Any]) -> LayerRules:
        """Which scheme each layer has.

        Raises:
            ConfigError: a key is missing, has the wrong type or a value nothing can mean.
            UnsupportedScheme: the config is well formed but not served; says what to do.
        """

    def codes_name(self, spec: SchemeSpec) -> str:
        """The tensor that a layer cannot do without: its codes, or its weight in 16 bits."""

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
            shapes: tensor name (such as `qweight`) to shape; holds at least `codes_name(spec)`.
            stored: (N, K) as a SHAPE tensor says, where the checkpoint has one.
        """

    def scheme(self, weight: WeightSpec, activation: ActivationSpec | None) -> SchemeSpec:
        """How the dialect stores these numerics: the variant is chosen.

        Raises:
            UnsupportedScheme: the dialect cannot store them, or is read but not written.
        """

    def render(self, layers: Mapping[str, SchemeSpec], ignore: tuple[str, ...]) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint.

        Args:
            layers: every quantised layer's name in the checkpoint, to its scheme; at least one.
            ignore: linear layers in 16 bits: whole names, or regular expressions behind `re:`.

        Raises:
            UnsupportedScheme: the dialect cannot store a scheme, or several beside each other.
        """


def _usual(found: torch.dtype) -> torch.dtype:
    return torch.float8_e5m2 if found is torch.float8_e5m2fnuz else torch.float8_e4m3fn
