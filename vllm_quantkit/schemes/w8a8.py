"""8-bit weights times 8-bit activations: integers or FP8, scales multiplied in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from quantkit_kernels.act_quant import RowQuantizer, quantize_rows
from quantkit_kernels.scaled_mm import names, pack_scaled
from quantkit_kernels.targets import Target, target_of
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats import Role
from vllm_quantkit.schemes.base import LinearScheme, PackedLayer
from vllm_quantkit.schemes.wna16 import WNA16
from vllm_quantkit.spec import ActivationSpec

FP8_CAPABILITY = (8, 9)
"""Compute capability from which GPUs multiply FP8 (Ada, Hopper)."""

NO_FP8 = "weight-only because this GPU has no FP8 arithmetic"
"""What a kernel's name says where FP8 activations stay in 16 bits."""


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
            return WNA16(self.spec).pack_weight_only(parts, dtype, NO_FP8)
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
            name=self._named(packed_weight.kernel),
            quantizer=packed_weight.quantizer,
            code_type=packed_weight.code_type,
            group_size=packed_weight.group_size,
            in_features=packed_weight.in_features,
            out_features=packed_weight.out_features,
            dtype=dtype,
        )
        return PackedLayer(tensors, kernel)

    def kernel_name(
        self, target: Target, dtype: torch.dtype, *, fixed_outliers: bool = False
    ) -> str:
        """The kernel, and how activations are quantised, unless the GPU lacks FP8 for them."""
        assert self.spec.activation is not None
        code_type = self.spec.weight.code_type
        if code_type != "int" and target_lacks_fp8(target):
            return WNA16(self.spec).weight_only_name(target, dtype, NO_FP8)
        return self._named(names.kernel_name(target, code_type, self.spec.activation.code))

    def _named(self, kernel: str) -> str:
        assert self.spec.activation is not None
        return f"{kernel}, {self.spec.activation.describe()}"


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
    check_leading(int((index == 0).sum()), last - first + 1, group_size)
    groups = slice(first, last + 1)
    return replace(
        weight,
        scales=weight.scales[:, groups],
        zeros=weight.zeros[:, groups],
        group_index=index,
    )


def check_cuts(in_features: int, ranks: int, group_size: int) -> None:
    """No rank's share of the input channels starts inside a group, as `own_groups` wants it.

    Args:
        in_features: of the whole layer.
        ranks: that have equal shares of them.
        group_size: channels that share a scale; -1 for all of them.

    Raises:
        UnsupportedScheme: one does.
    """
    share = in_features // ranks
    for start in range(0, in_features, share) if group_size > 0 else ():
        groups = (start + share - 1) // group_size - start // group_size + 1
        leading = min(group_size - start % group_size, share)
        check_leading(leading, groups, group_size)


def check_leading(leading: int, groups: int, group_size: int) -> None:
    """A rank that has several groups has all of its first.

    Args:
        leading: its channels of the first.
        groups: how many it has channels of.
        group_size: channels of a whole one.

    Raises:
        UnsupportedScheme: it has not.
    """
    if groups > 1 and leading < group_size:
        raise UnsupportedScheme(
            f"this tensor-parallel rank has {leading} channels of its first block of "
            f"{group_size}; choose a tensor-parallel size that cuts between blocks"
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
    return device.type == "cuda" and target_lacks_fp8(target_of(device))


def target_lacks_fp8(target: Target) -> bool:
    """The same for a target that need not be here."""
    return target.capability is not None and target.capability < FP8_CAPABILITY
