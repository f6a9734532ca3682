"""`quantkit::scaled_linear`: schema, fake, argument checks and one implementation per device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowCode, RowQuantizer
from quantkit_kernels.devices import ACTIVATION_DTYPES, DISPATCH, backend, layout
from quantkit_kernels.scaled_mm.weights import (
    ScaledWeight,
    check_codes,
    check_groups,
    check_weight,
    row_quantizer,
)
from quantkit_kernels.wna16.weights import QuantizedWeight

torch.library.define(
    "quantkit::scaled_linear",
    "(Tensor rows, Tensor codes, Tensor scales, Tensor? sums, Tensor? bias, str code_type, "
    "str row_code, int row_group, int group_size, int in_features, int out_features, "
    "ScalarType dtype, Tensor? residual=None, Tensor? zeros=None) -> Tensor",
)


def pack_scaled(
    weight: QuantizedWeight,
    quantizer: RowQuantizer,
    dtype: torch.dtype,
    device_type: str | None = None,
) -> ScaledWeight:
    """Lay `weight` out for the kernel of the device it lies on.

    Args:
        weight: N x K, 8-bit codes; integers with one scale and zero-point per output channel, or
            E4M3 or E5M2 with one scale per output channel or per group of it.
        quantizer: how the rows it will multiply are quantised. Zero-points other than 128 need the
            rows' sums as well: `ScaledWeight.quantizer` then asks for them.
        dtype: of the results: float16, bfloat16 or float32.
        device_type: lay it out as for another kind of device, which need not be here.

    Raises:
        ValueError: the dtype is none of these, or weight and rows are not served together.
    """
    _check_dtype(dtype)
    check_weight(weight, quantizer)
    here = weight.codes.device.type
    device = backend("scaled_mm", here) if device_type is None else layout("scaled_mm", device_type)
    packed: ScaledWeight = device.pack(weight, quantizer, dtype)
    return packed


def scaled_linear(
    rows: Tensor,
    weight: ScaledWeight,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = (sx (xq - zx)) (sw (value(codes) - zw))^T + bias + residual.

    Scales are sx[m, k // group size of rows] and sw[n, k // group size of the weight].

    Args:
        rows: uint8 [..., stride], as `weight.quantizer` lays them out.
        weight: packed for the device of `rows`.
        dtype: of the result: float16, bfloat16 or float32.
        bias: [N] or None.
        residual: [..., N] or None.

    Returns:
        [..., N] in `dtype`.
    """
    y: Tensor = torch.ops.quantkit.scaled_linear(
        rows,
        weight.codes,
        weight.scales,
        weight.sums,
        bias,
        weight.code_type,
        weight.quantizer.code,
        weight.quantizer.group_size,
        weight.group_size,
        weight.in_features,
        weight.out_features,
        dtype,
        residual,
        weight.zeros,
    )
    return y


@torch.library.register_fake("quantkit::scaled_linear")
def _fake(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    code_type: str,
    row_code: str,
    row_group: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    kinds, sizes = (code_type, row_code, row_group), (group_size, in_features, out_features)
    check_arguments(rows, zeros, bias, residual, *kinds, *sizes, dtype)
    return rows.new_empty(*rows.shape[:-1], out_features, dtype=dtype)


def check_arguments(
    rows: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    code_type: str,
    row_code: str,
    row_group: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> None:
    """Refuse what no kernel can run, naming the value.

    Raises:
        ValueError: rows, bias, residual, dtype or code types do not fit the weight or each other.
    """
    summed = zeros is not None
    stride = _row_stride(code_type, row_code, row_group, group_size, in_features, summed)
    if rows.dtype != torch.uint8:
        raise ValueError(f"rows are {rows.dtype}, expected torch.uint8 from the row quantiser")
    if rows.shape[-1] != stride:
        raise ValueError(
            f"rows have {rows.shape[-1]} bytes, but {in_features} channels take {stride}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out_features},)")
    if residual is not None and residual.shape != (*rows.shape[:-1], out_features):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, "
            f"expected {(*rows.shape[:-1], out_features)}"
        )
    _check_dtype(dtype)


@lru_cache(maxsize=1024)
def _row_stride(
    code_type: str,
    row_code: str,
    row_group: int,
    group_size: int,
    in_features: int,
    summed: bool,
) -> int:
    """Bytes of a row, if rows and weight are served together."""
    check_codes(code_type, row_code)
    quantizer = row_quantizer(cast("RowCode", row_code), row_group, in_features, summed)
    check_groups(quantizer, in_features, group_size)
    return quantizer.layout(in_features).stride


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"results of {dtype} are not served; use one of {ACTIVATION_DTYPES}")


def _implementation(device_type: str) -> Callable[..., Tensor]:
    def run(
        rows: Tensor,
        codes: Tensor,
        scales: Tensor,
        sums: Tensor | None,
        bias: Tensor | None,
        code_type: str,
        row_code: str,
        row_group: int,
        group_size: int,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        residual: Tensor | None = None,
        zeros: Tensor | None = None,
    ) -> Tensor:
        kinds, sizes = (code_type, row_code, row_group), (group_size, in_features, out_features)
        check_arguments(rows, zeros, bias, residual, *kinds, *sizes, dtype)
        flat = rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])
        added = residual if residual is None else residual.reshape(-1, out_features)
        tensors = (codes, scales, sums, zeros, bias, added)
        linear = backend("scaled_mm", device_type).linear
        y: Tensor = linear(flat, *tensors, *kinds, *sizes, dtype)
        return y if rows.dim() == 2 else y.reshape(*rows.shape[:-1], out_features)

    return run


for _device_type, _dispatch in DISPATCH.items():
    torch.library.impl("quantkit::scaled_linear", _dispatch, _implementation(_device_type))
