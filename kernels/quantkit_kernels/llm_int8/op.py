"""`quantkit::llm_int8_linear`: schema, fake, argument checks and one implementation per device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.devices import DISPATCH, backend, check_activations
from quantkit_kernels.llm_int8.names import named
from quantkit_kernels.llm_int8.reference import ROWS
from quantkit_kernels.scaled_mm import pack_scaled
from quantkit_kernels.wna16 import QuantizedWeight

torch.library.define(
    "quantkit::llm_int8_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? sums, Tensor? outliers, Tensor? bias, "
    "float threshold, int in_features, int out_features, Tensor? residual=None) -> Tensor",
)


@dataclass(frozen=True)
class LlmInt8Weight:
    """An int8 weight in the layout of the kernel that multiplies int8 rows by it.

    Attributes:
        codes: integer codes, packed.
        scales: one per output channel, packed.
        sums: sum over k of (code - 128) for each output channel, packed; None where the kernel
            needs none.
        in_features: K, the channels of x.
        out_features: N, the channels of y.
        kernel: the kernel's name, for the log.
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor | None
    in_features: int
    out_features: int
    kernel: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        tensors = (self.codes, self.scales, self.sums)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def pack_llm_int8(weight: QuantizedWeight, dtype: torch.dtype) -> LlmInt8Weight:
    """Lay `weight` out for the kernel of the device it lies on.

    Args:
        weight: N x K, 8 bits, one scale per output channel, all zero-points 128.
        dtype: the activations' dtype: float16, bfloat16 or float32.

    Raises:
        ValueError: the weight or the dtype is none of these.
    """
    check_activations(dtype)
    if weight.bits != 8 or weight.code_type != "int" or weight.scales.shape[1] != 1:
        raise ValueError(
            f"the weight has {weight.bits}-bit {weight.code_type!r} codes with "
            f"{weight.scales.shape[1]} scales per channel; LLM.int8 takes 8-bit integers with one"
        )
    if bool((weight.zeros != 128).any()):
        raise ValueError("the weight has zero-points other than 128; LLM.int8 is symmetric")
    packed = pack_scaled(weight, ROWS, dtype)
    return LlmInt8Weight(
        codes=packed.codes,
        scales=packed.scales,
        sums=packed.sums,
        in_features=packed.in_features,
        out_features=packed.out_features,
        kernel=named(packed.kernel),
    )


def llm_int8_linear(
    x: Tensor,
    weight: LlmInt8Weight,
    threshold: float,
    outliers: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = x_O W_O^T + (sx Q(x_rest)) W_rest^T + bias + residual (arXiv 2208.07339).

    Outlier channels O keep the precision of x; in the others each token is quantised to int8.

    Args:
        x: float16, bfloat16 or float32 [..., K].
        weight: packed for the dtype and device of `x`.
        threshold: O are the channels with any |x[m, k]| above it in the batch.
        outliers: int32 [any], distinct channels that are O instead.
        bias: [N] or None.
        residual: [..., N] or None.

    Returns:
        [..., N] in the dtype of `x`.

    Raises:
        ValueError: the arguments do not fit together.
    """
    y: Tensor = torch.ops.quantkit.llm_int8_linear(
        x,
        weight.codes,
        weight.scales,
        weight.sums,
        outliers,
        bias,
        threshold,
        weight.in_features,
        weight.out_features,
        residual,
    )
    return y


@torch.library.register_fake("quantkit::llm_int8_linear")
def _fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    outliers: Tensor | None,
    bias: Tensor | None,
    threshold: float,
    in_features: int,
    out_features: int,
    residual: Tensor | None = None,
) -> Tensor:
    check_arguments(x, outliers, bias, residual, threshold, in_features, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


def check_arguments(
    x: Tensor,
    outliers: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    threshold: float,
    in_features: int,
    out_features: int,
) -> None:
    """Refuse what no kernel can run, naming the value.

    Raises:
        ValueError: x, bias, residual, outliers or threshold do not fit the weight.
    """
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} channels, but the weight takes {in_features}")
    check_activations(x.dtype)
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out_features},)")
    if residual is not None and residual.shape != (*x.shape[:-1], out_features):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, expected {(*x.shape[:-1], out_features)}"
        )
    if outliers is not None and (outliers.dtype != torch.int32 or outliers.dim() != 1):
        raise ValueError(
            f"outliers are {outliers.dtype} with {outliers.dim()} dimensions; "
            "give channel numbers as int32 with one"
        )
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; it must be positive (the paper's is 6)")


def _implementation(device_type: str) -> Callable[..., Tensor]:
    def run(
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        sums: Tensor | None,
        outliers: Tensor | None,
        bias: Tensor | None,
        threshold: float,
        in_features: int,
        out_features: int,
        residual: Tensor | None = None,
    ) -> Tensor:
        check_arguments(x, outliers, bias, residual, threshold, in_features, out_features)
        rows = x if x.dim() == 2 else x.reshape(-1, in_features)
        added = residual if residual is None else residual.reshape(-1, out_features)
        tensors = (codes, scales, sums, outliers, bias, added)
        linear = backend("llm_int8", device_type).linear
        y: Tensor = linear(rows, *tensors, threshold, in_features, out_features)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], out_features)

    return run


for _device_type, _dispatch in DISPATCH.items():
    torch.library.impl("quantkit::llm_int8_linear", _dispatch, _implementation(_device_type))
