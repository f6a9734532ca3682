"""Weight-only integers: W in 2 to 8 bits with group scales, activations in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.wna16 import QuantizedWeight, pack_weight
from vllm_quantkit.formats import CheckpointTensor, Role, get_format
from vllm_quantkit.schemes.base import LinearScheme, PackedLayer
from vllm_quantkit.spec import LayerShape, SchemeSpec


class WNA16(LinearScheme):
    """y = x (scales (codes - zeros))^T + b, dequantised inside the kernel."""

    def __init__(self, spec: SchemeSpec) -> None:
        super().__init__(spec)
        self._format = get_format(spec.dialect)

    def tensors(self, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
        """The dialect's tensors for this layer."""
        return self._format.tensors(self.spec, shape)

    def pack(self, parts: Mapping[Role, Tensor], dtype: torch.dtype) -> PackedLayer:
        """Codes, scales, zero-points and group index to the layout of `quantkit::wna16_linear`.

        Raises:
            ValueError: a scale is not finite, or a group index is out of range.
        """
        packed = pack_weight(self._int_weight(parts), dtype)
        optional = {"weight_zeros": packed.zeros, "input_gather": packed.gather}
        tensors = {
            "weight_packed": packed.codes,
            "weight_scales": packed.scales,
            **{name: tensor for name, tensor in optional.items() if tensor is not None},
        }
        kernel = WNA16Kernel(
            name=f"{packed.kernel}, {self.spec.weight.bits} bits, group {packed.group_size}",
            bits=packed.bits,
            group_size=packed.group_size,
            in_features=packed.in_features,
            out_features=packed.out_features,
        )
        return PackedLayer(tensors, kernel)

    def _int_weight(self, parts: Mapping[Role, Tensor]) -> QuantizedWeight:
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
        )


@dataclass(frozen=True)
class WNA16Kernel:
    """`quantkit::wna16_linear` for one packed weight."""

    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int

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
        )
        return y
