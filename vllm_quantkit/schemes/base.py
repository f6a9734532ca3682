"""What a quantisation method offers: which checkpoints it takes, and how a layer computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats import CheckpointTensor, Role, get_format
from vllm_quantkit.spec import LayerRules, LayerShape, SchemeSpec


class LinearScheme(ABC):
    """How one linear layer stores its weight and computes y = x W^T + b.

    It knows neither vLLM nor tensor parallelism: it is given one rank's share.
    """

    def __init__(self, spec: SchemeSpec) -> None:
        self.spec = spec

    @abstractmethod
    def tensors(self, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
        """The checkpoint tensors of a layer of this shape."""

    @abstractmethod
    def pack(self, parts: Mapping[Role, Tensor], dtype: torch.dtype) -> PackedLayer:
        """Canonical tensors to the layout of a kernel, on the device they lie on.

        Args:
            parts: canonical tensors by role, see `Role`.
            dtype: of the activations.

        Raises:
            ValueError: a value no kernel can use, such as a scale that is not finite.
        """


class LinearKernel(Protocol):
    """The product of a packed layer; holds sizes, never tensors."""

    @property
    def name(self) -> str:
        """For the log: kernel, bits and group size."""

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """y = x W^T + b, [..., K] to [..., N], the weight read from `tensors`."""


@dataclass(frozen=True)
class PackedLayer:
    """A weight ready to multiply.

    Attributes:
        tensors: by the name under which a module will own them.
        kernel: reads them.
    """

    tensors: dict[str, Tensor]
    kernel: LinearKernel


class Method(ABC):
    """A name a user gives to `--quantization`.

    Attributes:
        dialects: checkpoints (`quant_method`) it takes; the first where the config names none.
    """

    name: ClassVar[str]
    dialects: ClassVar[tuple[str, ...]]

    @classmethod
    def takes(cls, config: Mapping[str, Any]) -> bool:
        """True where a checkpoint with this `quantization_config` is for this method."""
        return str(config.get("quant_method", "")).lower() in cls.dialects

    @classmethod
    def rules(cls, config: Mapping[str, Any]) -> LayerRules:
        """Scheme by layer of a checkpoint with this `quantization_config`.

        Raises:
            ConfigError, UnsupportedScheme: as `get_format` and the dialect's `parse`, or the
                checkpoint is for another method.
        """
        if not config:
            raise UnsupportedScheme(
                f"--quantization {cls.name} serves checkpoints that are already quantised, but "
                f"this model's config.json has no quantization_config. Quantise the model first "
                f"(vllm_quantkit.quantize) or drop the flag to serve it in 16 bits."
            )
        # The older files beside config.json do not name their method.
        config = {"quant_method": cls.dialects[0], **config}
        dialect = get_format(str(config["quant_method"]).lower())
        if not cls.takes(config):
            raise UnsupportedScheme(
                f"--quantization {cls.name} serves quant_method {', '.join(cls.dialects)}, but "
                f"this checkpoint says {config['quant_method']!r}. Use --quantization "
                f"quantkit, which picks the method from the checkpoint."
            )
        return dialect.parse(config)

    @classmethod
    @abstractmethod
    def linear(cls, spec: SchemeSpec) -> LinearScheme:
        """The scheme of a layer described by `spec`."""
