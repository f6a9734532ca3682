"""What a quantisation method offers: which checkpoints it takes, and how a layer computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowQuantizer
from quantkit_kernels.code_types import CODE_BOOKS
from quantkit_kernels.targets import Target
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.formats import CheckpointTensor, Role, get_format
from vllm_quantkit.options import LayerOptions
from vllm_quantkit.quantize.methods.data_free import Refinement, quantize_data_free
from vllm_quantkit.spec import LayerRules, LayerShape, SchemeSpec

Assemble = Callable[[Mapping[str, Tensor], LayerShape, SchemeSpec], dict[Role, Tensor]]


class LinearScheme(ABC):
    """How one linear layer stores its weight and computes y = x W^T + b.

    It knows neither vLLM nor tensor parallelism: it is given one rank's share.
    """

    def __init__(self, spec: SchemeSpec) -> None:
        self.spec = spec
        self._format = get_format(spec.dialect)

    def tensors(self, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
        """The checkpoint tensors of a layer of this shape, as its dialect has them."""
        return self._format.tensors(self.spec, shape)

    @property
    def assembles(self) -> bool:
        """True where the dialect's tensors only mean something together, see `assemble`."""
        return self.spec.weight.code_type in CODE_BOOKS and hasattr(self._format, "assemble")

    def assemble(self, stored: Mapping[str, Tensor], shape: LayerShape) -> dict[Role, Tensor]:
        """Canonical tensors of a layer from all that a checkpoint stores of it.

        Raises:
            ValueError: the tensors contradict each other or the layer's shape.
        """
        assemble: Assemble = getattr(self._format, "assemble")  # noqa: B009 - only some have it
        return assemble(stored, shape, self.spec)

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """A 16-bit weight [N, K] rounded without data.

        Raises:
            QuantkitError: the weight is not finite.
        """
        refine = cast(Refinement, self.spec.variant)
        return quantize_data_free(weight, self.spec.weight, refine)

    @abstractmethod
    def pack(self, parts: Mapping[Role, Tensor], dtype: torch.dtype) -> PackedLayer:
        """Canonical tensors to the layout of a kernel, on the device they lie on.

        Args:
            parts: canonical tensors by role, see `Role`.
            dtype: of the activations.

        Raises:
            ValueError: a value no kernel can use, such as a scale that is not finite.
        """

    @abstractmethod
    def kernel_name(
        self, target: Target, dtype: torch.dtype, *, fixed_outliers: bool = False
    ) -> str:
        """What the log calls the kernel that `pack` chooses on a target, which need not be here.

        Args:
            target: where the layer runs.
            dtype: of the activations.
            fixed_outliers: True where statistics of the layer's inputs are given.
        """

    def _weight(self, parts: Mapping[Role, Tensor]) -> QuantizedWeight:
        """The canonical tensors as a weight.

        Raises:
            ValueError: a scale is not finite.
        """
        scales = parts[Role.SCALES].float()
        bad = ~torch.isfinite(scales)
        if bad.any():
            row, group = bad.nonzero()[0].tolist()
            raise ValueError(
                f"the scale of output channel {row}, group {group} is {scales[row, group].item()}"
            )
        return QuantizedWeight(
            codes=parts[Role.CODES],
            scales=scales,
            zeros=parts[Role.ZEROS].to(torch.uint8),
            group_index=parts[Role.GROUP_INDEX],
            bits=self.spec.weight.bits,
            code_type=self.spec.weight.code_type,
        )


class LinearKernel(Protocol):
    """The product of a packed layer; holds sizes, never tensors."""

    @property
    def name(self) -> str:
        """For the log: kernel, bits and group size."""

    @property
    def quantizer(self) -> RowQuantizer | None:
        """How it quantises its input, which it also takes quantised; None if it does not."""

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
        contents: what it serves, in words, for refusals.
        options: the `LayerOptions` it looks at when it quantises a model at load.
        config_files: where its older checkpoints keep what is now in config.json.
        smooths: True where activation statistics move outliers from activations into weights.
        int4_cache: True where the KV cache is INT4 without a further word.
    """

    name: ClassVar[str]
    dialects: ClassVar[tuple[str, ...]]
    contents: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    config_files: ClassVar[tuple[str, ...]] = ()
    smooths: ClassVar[bool] = False
    int4_cache: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """True where a checkpoint layer described by `spec` is for this method."""

    @classmethod
    def at_load(cls, options: LayerOptions) -> SchemeSpec | None:
        """What a layer of a 16-bit model becomes; None leaves it as it is.

        Raises:
            UnsupportedScheme: the method needs calibration, so it serves checkpoints only.
        """
        raise UnsupportedScheme(
            f"--quantization {cls.name} serves checkpoints that are already quantised, but "
            f"this model's config.json has no quantization_config. Quantise the model first "
            f"(vllm_quantkit.quantize), use a method that quantises at load "
            f"(quantkit-int4, quantkit-int8, quantkit-fp8, quantkit-smoothquant), or drop the "
            f"flag to serve it in 16 bits."
        )

    @classmethod
    def check_options(cls, options: LayerOptions) -> None:
        """Only options that the method looks at are set.

        Raises:
            ConfigError: names the option.
        """
        for name, value in options.given().items():
            if name not in cls.options:
                raise ConfigError(
                    f"--additional-config quantkit: {name} = {value!r} means nothing to "
                    f"{cls.name}; it takes {', '.join(cls.options) or 'no such option'}."
                )

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
        # The older files beside config.json do not name their method.
        config = {"quant_method": cls.dialects[0], **config}
        dialect = get_format(str(config["quant_method"]).lower())
        if not cls.takes(config):
            raise cls._refusal(f"quant_method {config['quant_method']!r}")
        rules = dialect.parse(config)
        for spec in rules.schemes:
            if not cls.serves(spec):
                raise cls._refusal(spec.describe())
        return rules

    @classmethod
    def _refusal(cls, found: str) -> UnsupportedScheme:
        return UnsupportedScheme(
            f"--quantization {cls.name} serves {cls.contents} (quant_method "
            f"{', '.join(cls.dialects)}), but this checkpoint says {found}. Use --quantization "
            f"quantkit, which picks the method from the checkpoint."
        )
