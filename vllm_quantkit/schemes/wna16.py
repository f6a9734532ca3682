"""Weight-only: W in 2 to 8 bits, integers, floats or a code book; activations in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit_kernels.targets import Target
from quantkit_kernels.wna16 import names, pack_weight
from vllm_quantkit.formats import Role
from vllm_quantkit.schemes.base import LinearScheme, PackedLayer


class WNA16(LinearScheme):
    """y = x (scales value(codes))^T + b, dequantised inside the kernel."""

    def pack(self, parts: Mapping[Role, Tensor], dtype: torch.dtype) -> PackedLayer:
        """Codes, scales, zero-points and group index to the layout of `quantkit::wna16_linear`.

        Raises:
            ValueError: a scale is not finite, or a group index is out of range.
        """
        return self.pack_weight_only(parts, dtype)

    def pack_weight_only(
        self, parts: Mapping[Role, Tensor], dtype: torch.dtype, reason: str = ""
    ) -> PackedLayer:
        """As `pack`; the kernel's name says `reason`, why activations stay in 16 bits.

        Raises:
            ValueError: as `pack`.
        """
        packed = pack_weight(self._weight(parts), dtype)
        optional = {"weight_zeros": packed.zeros, "input_gather": packed.gather}
        tensors = {
            "weight_packed": packed.codes,
            "weight_scales": packed.scales,
            **{name: tensor for name, tensor in optional.items() if tensor is not None},
        }
        kernel = WNA16Kernel(
            name=self._named(packed.kernel, reason),
            bits=packed.bits,
            group_size=packed.group_size,
            in_features=packed.in_features,
            out_features=packed.out_features,
            code_type=packed.code_type,
            zero=packed.zero,
        )
        return PackedLayer(tensors, kernel)

    def kernel_name(
        self, target: Target, dtype: torch.dtype, *, fixed_outliers: bool = False
    ) -> str:
        """The kernel by its container, and the weight's numerics."""
        return self.weight_only_name(target, dtype)

    def weight_only_name(self, target: Target, dtype: torch.dtype, reason: str = "") -> str:
        """As `kernel_name`, of `pack_weight_only`."""
        weight = self.spec.weight
        kernel = names.kernel_name(target, weight.bits, weight.code_type, dtype)
        return self._named(kernel, reason)

    def _named(self, kernel: str, reason: str) -> str:
        return ", ".join(filter(None, (kernel, self.spec.weight.describe(), reason)))


@dataclass(frozen=True)
class WNA16Kernel:
    """`quantkit::wna16_linear` for one packed weight."""

    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    code_type: str
    zero: int | None = None
    quantizer: ClassVar[None] = None

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """y = x W^T + b."""
        y: Tensor = torch.ops.quantkit.wna16_linear(
            x,
            tensors["weight_packed"],
            tensors["weight_scales"],
            tensors.get("weight_zeros"),
            tensors.get("input_gather"),
            bias,
            self.bits,
            self.group_size,
            self.in_features,
            self.out_features,
            self.code_type,
            self.zero,
        )
        return y
