"""8-bit weights times 8-bit activations: integers or FP8, scales multiplied in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from quantkit_kernels.act_quant import RowQuantizer, quantize_rows
from quantkit_kernels.scaled_mm import pack_scaled
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats import Role
from vllm_quantkit.schemes.base import LinearScheme, PackedLayer
from vllm_quantkit.schemes.wna16 import WNA16
from vllm_quantkit.spec import ActivationSpec

FP8_CAPABILITY = (8, 9)
"""Compute capability from which GPUs multiply FP8 (Ada, Hopper)."""


class W8A8(LinearScheme):
    """y = (sx xq) (sw wq)^T + b; a GPU without FP8 multiplies FP8 weights by 16-bit activations."""

    def pack(self, parts: Mapping[Role, Tensor], dtype: torch.dtype) -> PackedLayer:
        """Codes and scales to the layout of `quantkit::scaled_linear`.

        Raises:
            ValueError: a scale is not finite.
            UnsupportedScheme: this rank starts inside a group.
        """
        assert self.spec.activation is not None
        if self.spec.weight.code_type != "int" and lacks_fp8(parts[Role.CODES].device):
            reason = "weight-only because this GPU has no FP8 arithmetic"
            return WNA16(self.spec).pack_weight_only(parts, dtype, reason)
        quantizer = row_quantizer(self.spec.activation)
        own = own_groups(self._weight(parts), self.spec.weight.group_size)
        packed_weight = pack_scaled(own, quantizer, dtype)
        optional = {
            "weight_sums": packed_weight.sums,
            "weight_zeros": packed_weight.zeros,
            "input_scale": parts.get(Role.INPUT_SCALE),
            "input_zero": parts.get(Role.INPUT_ZERO),
        }
        tensors = {
            "weight_packed": packed_weight.codes,
            "weight_scales": packed_weight.scales,
            **{name: tensor for name, tensor in optional.items() if tensor is not None},
        }
        kernel = W8A8Kernel(
            name=f"{packed_weight.kernel}, {self.spec.activation.describe()}",
            quantizer=packed_weight.quantizer,
            code_type=packed_weight.code_type,
            group_size=packed_weight.group_size,
            in_features=packed_weight.in_features,
            out_features=packed_weight.out_features,
            dtype=dtype,
        )
        return PackedLayer(tensors, kernel)


@dataclass(frozen=True)
class W8A8Kernel:
    """`quantkit::scaled_linear` for one packed weight; x may come quantised, as uint8 rows."""

    name: str
    quantizer: RowQuantizer
    code_type: str
    group_size: int
    in_features: int
    out_features: int
    dtype: torch.dtype

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """y = x W^T + b."""
        if x.dtype != torch.uint8:
            x = quantize_rows(
                x, self.quantizer, tensors.get("input_scale"), tensors.get("input_zero")
            )
        y: Tensor = torch.ops.quantkit.scaled_linear(
            x,
            tensors["weight_packed"],
            tensors["weight_scales"],
            tensors.get("weight_sums"),
            bias,
            self.code_type,
            self.quantizer.code,
            self.quantizer.group_size,
            self.group_size,
            self.in_features,
            self.out_features,
            self.dtype,
            zeros=tensors.get("weight_zeros"),
        )
        return y


def own_groups(weight: QuantizedWeight, group_size: int) -> QuantizedWeight:
    """The weight with the scales of its own channels only, its groups counted from 0.

    Raises:
        UnsupportedScheme: the channels start inside a group, whose other part another rank has;
            activation groups start with the rank's first channel.
    """
    first, last = int(weight.group_index[0]), int(weight.group_index[-1])
    index = weight.group_index - first
    leading = int((index == 0).sum())
    if last > first and leading < group_size:
        raise UnsupportedScheme(
            f"this tensor-parallel rank has {leading} channels of its first block of "
            f"{group_size}; choose a tensor-parallel size that cuts between blocks"
        )
    groups = slice(first, last + 1)
    return replace(
        weight,
        scales=weight.scales[:, groups],
        zeros=weight.zeros[:, groups],
        group_index=index,
    )


def row_quantizer(spec: ActivationSpec) -> RowQuantizer:
    """The kernel's description of quantised activations."""
    return RowQuantizer(
        code=spec.code,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        upper_bound=spec.upper_bound or inf,
    )


def lacks_fp8(device: torch.device) -> bool:
    """True for a CUDA GPU whose tensor cores have no FP8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY
