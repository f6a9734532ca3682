"""`quantkit::wna16_linear`: schema, fake, argument checks and one implementation per device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit_kernels.devices import DISPATCH, backend, check_activations, layout
from quantkit_kernels.wna16.weights import (
    CONTAINER_BITS,
    CONTAINER_OF,
    PackedWeight,
    QuantizedWeight,
    make_uniform,
)

torch.library.define(
    "quantkit::wna16_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? gather, Tensor? bias, "
    "int bits, int group_size, int in_features, int out_features, str code_type, "
    "int? zero=None, Tensor? residual=None) -> Tensor",
)


def pack_weight(
    weight: QuantizedWeight, dtype: torch.dtype, device_type: str | None = None
) -> PackedWeight:
    """Lay `weight` out for the kernel of the device it lies on.

    Args:
        weight: N x K weight.
        dtype: the activations' dtype: float16, bfloat16 or float32.
        device_type: lay it out as for another kind of device, which need not be here.

    Raises:
        ValueError: the dtype is none of these, or the weight's group index is out of range.
    """
    check_activations(dtype)
    here = weight.codes.device.type
    device = backend("wna16", here) if device_type is None else layout("wna16", device_type)
    packed: PackedWeight = device.pack(make_uniform(weight, device.CONTAINERS), dtype)
    return packed


def wna16_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y[m, n] = sum_k x[m, k] scales[n, g(k)] value(codes[n, k]) + bias[n] + residual[m, n].

    Args:
        x: float16, bfloat16 or float32 [..., K].
        weight: packed for the dtype and device of `x`.
        bias: [N] or None.
        residual: [..., N] or None.

    Returns:
        [..., N] in the dtype of `x`.
    """
    y: Tensor = torch.ops.quantkit.wna16_linear(
        x,
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.gather,
        bias,
        weight.bits,
        weight.group_size,
        weight.in_features,
        weight.out_features,
        weight.code_type,
        weight.zero,
        residual,
    )
    return y


@torch.library.register_fake("quantkit::wna16_linear")
def _fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    gather: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    code_type: str,
    zero: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    check_arguments(x, bias, residual, bits, in_features, out_features, code_type)
    return x.new_empty(*x.shape[:-1], out_features)


def check_arguments(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    in_features: int,
    out_features: int,
    code_type: str,
) -> None:
    """Refuse what no kernel can run, naming the value.

    Raises:
        ValueError: x, bias, residual, bits or code type do not fit the weight.
    """
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} channels, but the weight takes {in_features}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out_features},)")
    y_shape = (*x.shape[:-1], out_features)
    if residual is not None and residual.shape != y_shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, expected {y_shape}")
    if bits not in CONTAINER_BITS:
        raise ValueError(f"codes of {bits} bits are not served; containers are 2, 4 or 8 bits")
    if code_type != "int" and CONTAINER_OF.get(code_type) != bits:
        raise ValueError(
            f"codes of type {code_type} in {bits} bits are not served; use int, or one of "
            f"{', '.join(f'{name} in {width}' for name, width in CONTAINER_OF.items())}"
        )
    check_activations(x.dtype)


def _implementation(device_type: str) -> Callable[..., Tensor]:
    def run(
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        gather: Tensor | None,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        in_features: int,
        out_features: int,
        code_type: str,
        zero: int | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        check_arguments(x, bias, residual, bits, in_features, out_features, code_type)
        kind = (bits, group_size, in_features, out_features, code_type, zero)
        rows = x if x.dim() == 2 else x.reshape(-1, in_features)
        added = None if residual is None else residual.reshape(-1, out_features)
        y: Tensor = backend("wna16", device_type).linear(
            rows, codes, scales, zeros, gather, bias, *kind, added
        )
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], out_features)

    return run


for _device_type, _dispatch in DISPATCH.items():
    torch.library.impl("quantkit::wna16_linear", _dispatch, _implementation(_device_type))
