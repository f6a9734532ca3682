"""vLLM's operations that quantise what they make, and what it runs where it has none."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contender import E4M3_ROWS, INT8_ROWS, INT8_SILU_ROWS, Contender, Layer
from benchmarks.gpu.ours import EPSILON
from benchmarks.gpu.peers_vllm_scaled import cuda_ops
from benchmarks.gpu.problems import BLOCK_FP8, FP8, FP8_BLOCK, INT8

Quantised = tuple[Tensor, Tensor]
"""Codes [M, K], scales [M, groups]."""


class VllmFused(Layer):
    """An operation whose result is codes and scales.

    Raises:
        ImportError: vLLM is not installed, or not built for CUDA.
    """

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        cuda_ops()
        self.channels, self.dtype = channels, dtype

    def value(self, result: Quantised) -> Tensor:
        """codes * scales."""
        codes, scales = result
        return codes.float() * scales.repeat_interleave(self.channels // scales.shape[1], 1)


class VllmAddRmsNorm(VllmFused):
    """The residual is replaced by the sum."""

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, a residual, and the norm's weight."""
        return x, x.roll(1, -1), x.new_ones(self.channels)

    def __call__(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Any:
        """Codes and scales of norm(x + residual), per token."""
        x, residual, weight = inputs
        return cuda_ops().rms_norm_dynamic_per_token_quant(
            x, weight, EPSILON, self.dtype, None, residual
        )


class VllmSiluMul(VllmFused):
    """Two kernels: vLLM has none that makes dynamic scales per token."""

    def __call__(self, inputs: Tensor) -> Quantised:
        """Codes and scales of silu(x[:, :K]) * x[:, K:], per token."""
        ops = cuda_ops()
        y = inputs.new_empty(inputs.shape[0], self.channels)
        torch.ops._C.silu_and_mul(y, inputs)
        if self.dtype == torch.int8:
            codes, scales, _ = ops.scaled_int8_quant(y)
        else:
            codes, scales = ops.scaled_fp8_quant(y, use_per_token_if_dynamic=True)
        return codes, scales


class VllmSiluMulBlock(VllmFused):
    """One kernel, scales for 128 channels."""

    def __call__(self, inputs: Tensor) -> Any:
        """Codes and scales of silu(x[:, :K]) * x[:, K:], in groups."""
        return cuda_ops().silu_and_mul_per_block_quant(inputs, FP8_BLOCK, self.dtype)


def contenders() -> list[Contender]:
    """All of them."""
    fp8 = {"dtype": torch.float8_e4m3fn}
    int8 = {"dtype": torch.int8}
    norm, silu = "add_rms_norm", "silu_mul"
    block = partial(VllmSiluMulBlock, **fp8)
    return [
        Contender("vLLM FP8 rows", FP8, partial(VllmAddRmsNorm, **fp8), E4M3_ROWS, norm),
        Contender("vLLM INT8 rows", INT8, partial(VllmAddRmsNorm, **int8), INT8_ROWS, norm),
        Contender("vLLM FP8 rows", FP8, partial(VllmSiluMul, **fp8), E4M3_ROWS, silu),
        Contender("vLLM INT8 rows", INT8, partial(VllmSiluMul, **int8), INT8_SILU_ROWS, silu),
        Contender("vLLM FP8 block rows", BLOCK_FP8, block, E4M3_ROWS, silu),
    ]
