"""Other implementations of a quantised linear layer, for comparison only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.packing import pack_aligned
from quantkit_kernels.wna16 import QuantizedWeight

Linear = Callable[[Tensor], Tensor]

VLLM_BLOCK = 16
"""Output columns that vLLM's CPU kernel keeps together."""


def aten_int4(weight: QuantizedWeight) -> Linear:
    """PyTorch's own CPU kernel, for symmetric weights; scales in bfloat16."""
    group_size = weight.codes.shape[1] // weight.scales.shape[1]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
    scales = weight.scales.T
    scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).bfloat16()

    def linear(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_zeros)

    return linear


def load_vllm() -> Any:
    """vLLM's custom ops with the kernels for this CPU.

    Raises:
        ImportError: vLLM is not installed, or not for CPUs.
    """
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ImportError("the vLLM installed here is not built for CPUs")
    current_platform.import_kernels()
    return _custom_ops


def vllm_int4(weight: QuantizedWeight) -> Linear:
    """vLLM's `cpu_gemm_wna16`, for symmetric weights; scales in bfloat16.

    Raises:
        ImportError: see `load_vllm`.
    """
    ops = load_vllm()
    out_features, in_features = weight.codes.shape
    columns = pack_aligned(weight.codes.T.contiguous(), 4)  # [K, N/8]
    blocks = columns.view(in_features, out_features // VLLM_BLOCK, VLLM_BLOCK // 8)
    packed = blocks.transpose(0, 1).reshape(out_features // VLLM_BLOCK, -1).contiguous()
    scales = weight.scales.T.bfloat16().contiguous()
    hint = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def linear(x: Tensor) -> Tensor:
        return ops.cpu_gemm_wna16(x, packed, scales, None, None, 8, hint)

    return linear


def vllm_int8(weight: QuantizedWeight) -> Linear:
    """vLLM's oneDNN product for int8 weights and activations, quantised by each call.

    Raises:
        ImportError: see `load_vllm`.
    """
    ops = load_vllm()
    signed = (weight.codes.to(torch.int16) - 128).to(torch.int8)
    scales = weight.scales.T.contiguous()
    handler = ops.create_onednn_scaled_mm(signed.T, scales, torch.bfloat16, True, False, 32)

    def linear(x: Tensor) -> Tensor:
        codes, row_scales, _ = ops.onednn_scaled_int8_quant(x)
        y = torch.empty(x.shape[0], weight.codes.shape[0], dtype=x.dtype)
        return ops.onednn_scaled_mm(handler, codes, y, row_scales, None, None, None)

    return linear
