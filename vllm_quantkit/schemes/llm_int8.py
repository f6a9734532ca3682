"""LLM.int8(): input channels with outliers in 16 bits, the rest in INT8 (arXiv 2208.07339)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit_kernels.llm_int8 import names, pack_llm_int8
from quantkit_kernels.targets import Target
from vllm_quantkit.formats import Role
from vllm_quantkit.options import LayerOptions
from vllm_quantkit.schemes.base import LinearScheme, Method, PackedLayer
from vllm_quantkit.spec import PER_CHANNEL, ActivationSpec, SchemeSpec, WeightSpec

THRESHOLD = 6.0
"""The magnitude from which the paper calls a feature an outlier."""


class LLMInt8(Method):
    """`--quantization quantkit-llm-int8`; reads what bitsandbytes wrote, 4-bit layers included."""

    name = "quantkit-llm-int8"
    dialects = ("bitsandbytes",)
    contents = "bitsandbytes checkpoints and 16-bit models"
    options = ("threshold",)

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """Whatever the dialect holds."""
        return True

    @classmethod
    def at_load(cls, options: LayerOptions) -> SchemeSpec:
        """INT8 per channel, per-token INT8 activations, outliers apart."""
        threshold = options.threshold or THRESHOLD
        return SchemeSpec(
            dialect="16-bit",
            variant="none",
            weight=WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True),
            activation=ActivationSpec(code="int8", outlier_threshold=threshold),
        )


class MixedInt8(LinearScheme):
    """y = x_O W_O^T + (sx Q(x_rest)) (sw codes_rest)^T + b."""

    def pack(self, parts: Mapping[Role, Tensor], dtype: torch.dtype) -> PackedLayer:
        """Codes and scales to the layout of `quantkit::llm_int8_linear`.

        With `Role.INPUT_ABSMAX` the outlier channels are fixed: those whose largest magnitude
        exceeds the threshold. Without, every batch has its own.

        Raises:
            ValueError: a scale is not finite.
        """
        assert self.spec.activation is not None
        assert self.spec.activation.outlier_threshold is not None
        threshold = self.spec.activation.outlier_threshold
        packed = pack_llm_int8(self._weight(parts), dtype)
        tensors = {"weight_packed": packed.codes, "weight_scales": packed.scales}
        if packed.sums is not None:
            tensors["weight_sums"] = packed.sums
        fixed = Role.INPUT_ABSMAX in parts
        if fixed:
            channels = (parts[Role.INPUT_ABSMAX] > threshold).nonzero()[:, 0].to(torch.int32)
            tensors["outlier_channels"] = channels
        kernel = MixedInt8Kernel(
            name=self._named(packed.kernel, fixed_outliers=fixed),
            threshold=threshold,
            in_features=packed.in_features,
            out_features=packed.out_features,
        )
        return PackedLayer(tensors, kernel)

    def kernel_name(
        self, target: Target, dtype: torch.dtype, *, fixed_outliers: bool = False
    ) -> str:
        """The kernel, the threshold, and who finds the outliers."""
        return self._named(names.kernel_name(target), fixed_outliers=fixed_outliers)

    def _named(self, kernel: str, *, fixed_outliers: bool) -> str:
        assert self.spec.activation is not None
        found = "fixed by statistics" if fixed_outliers else "found in every batch"
        threshold = self.spec.activation.outlier_threshold
        return f"{kernel}, channels above {threshold:g} in 16 bits, {found}"


@dataclass(frozen=True)
class MixedInt8Kernel:
    """`quantkit::llm_int8_linear` for one packed weight."""

    name: str
    threshold: float
    in_features: int
    out_features: int
    quantizer: ClassVar[None] = None

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """y = x W^T + b."""
        y: Tensor = torch.ops.quantkit.llm_int8_linear(
            x,
            tensors["weight_packed"],
            tensors["weight_scales"],
            tensors.get("weight_sums"),
            tensors.get("outlier_channels"),
            bias,
            self.threshold,
            self.in_features,
            self.out_features,
        )
        return y
