"""Any device: codes row-major, dequantised in fp32, multiplied by ATen. Correct, not fast."""

import torch
from torch import Tensor

from quantkit_kernels.code_types import CodeType, code_values
from quantkit_kernels.packing import pack_aligned, unpack_aligned
from quantkit_kernels.quant_math import dequantize_codes
from quantkit_kernels.wna16.names import GENERIC_CONTAINERS, generic_name
from quantkit_kernels.wna16.weights import PackedWeight, UniformWeight, gather_inputs

CONTAINERS = GENERIC_CONTAINERS


def pack(weight: UniformWeight, dtype: torch.dtype) -> PackedWeight:
    """Codes int32 [N, K' * bits / 32] with code k of a row in bit order; scales fp32 [N, G]."""
    return PackedWeight(
        codes=pack_aligned(weight.codes, weight.container_bits),
        scales=weight.scales.float(),
        zeros=weight.zeros,
        gather=weight.gather,
        bits=weight.container_bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.codes.shape[0],
        kernel=generic_name(weight.container_bits),
        code_type=weight.code_type,
    )


def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    gather: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    code_type: CodeType,
    zero: None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = [x, 0][:, gather] (scales value(codes))^T + bias + residual, in fp32.

    Args:
        x: [M, K]. Others as packed by `pack`.
        residual: [M, N] or None.

    Returns:
        [M, N] in the dtype of `x`.
    """
    columns = scales.shape[1] * group_size
    grouped = unpack_aligned(codes, bits, columns).unflatten(1, (-1, group_size))
    if code_type == "int":
        weight = dequantize_codes(grouped, scales.unsqueeze(-1), zeros.unsqueeze(-1))
    else:
        weight = code_values(code_type).to(codes.device)[grouped.long()] * scales.unsqueeze(-1)
    y = gather_inputs(x, gather, columns).float() @ weight.flatten(1).T
    for addend in (bias, residual):
        y = y if addend is None else y + addend.float()
    return y.to(x.dtype)
