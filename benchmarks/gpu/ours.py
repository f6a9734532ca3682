"""Our kernels, through the package's public operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contender import (
    E4M3_ROWS,
    EXACT,
    INT8_ROWS,
    INT8_SILU_ROWS,
    ROUNDED_WEIGHTS,
    SHORT_SUMS,
    Contender,
    Layer,
)
from benchmarks.gpu.problems import (
    BLOCK_FP8,
    FP8,
    FP8_BLOCK,
    INT8,
    LLM_INT8,
    W4,
    W4_G32,
    W8,
    Op,
)
from quantkit_kernels.act_quant import (
    RowQuantizer,
    add_rms_norm_quantize,
    quantize_rows,
    reference_quantize,
    silu_mul_quantize,
    split_rows,
)
from quantkit_kernels.llm_int8 import llm_int8_linear, pack_llm_int8
from quantkit_kernels.scaled_mm import pack_scaled, scaled_linear
from quantkit_kernels.wna16 import QuantizedWeight, pack_weight, wna16_linear

DTYPE = torch.bfloat16
EPSILON = 1e-5
OUTLIER_THRESHOLD = 6.0
"""Of LLM.int8 (arXiv 2208.07339)."""

INT8_ROWS_OF = RowQuantizer("int8")
E4M3_ROWS_OF = RowQuantizer("e4m3")
E4M3_BLOCK_ROWS_OF = RowQuantizer("e4m3", FP8_BLOCK)


class WeightOnly(Layer):
    """16-bit activations."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = pack_weight(weight, DTYPE)

    def __call__(self, inputs: Tensor) -> Tensor:
        """y = x W^T."""
        return wna16_linear(inputs, self.weight)


class Scaled(Layer):
    """8-bit activations, quantised by each call."""

    def __init__(self, weight: QuantizedWeight, quantizer: RowQuantizer) -> None:
        self.weight = pack_scaled(weight, quantizer, DTYPE)

    def __call__(self, inputs: Tensor) -> Tensor:
        """y = Q(x) W^T."""
        return scaled_linear(quantize_rows(inputs, self.weight.quantizer), self.weight, DTYPE)


class ScaledProduct(Scaled):
    """The product alone: activations come quantised."""

    def prepare(self, x: Tensor) -> Tensor:
        """Rows."""
        return quantize_rows(x, self.weight.quantizer)

    def seen(self, inputs: Tensor) -> Tensor:
        """What the rows stand for."""
        return split_rows(inputs, self.weight.quantizer, self.weight.in_features).dequantize()

    def __call__(self, inputs: Tensor) -> Tensor:
        """y = q W^T."""
        return scaled_linear(inputs, self.weight, DTYPE)


class LlmInt8(Layer):
    """Outlier channels in 16 bits, found by each call."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = pack_llm_int8(weight, DTYPE)

    def seen(self, inputs: Tensor) -> Tensor:
        """Outlier channels as they are, the others quantised per token."""
        x = inputs.float()
        outliers = (x.abs() > OUTLIER_THRESHOLD).any(0)
        rest = reference_quantize(x.masked_fill(outliers, 0), INT8_ROWS_OF).dequantize()
        return x.where(outliers, rest)

    def __call__(self, inputs: Tensor) -> Tensor:
        """y = x_O W_O^T + Q(x_rest) W_rest^T."""
        return llm_int8_linear(inputs, self.weight, OUTLIER_THRESHOLD)


class FusedLayer(Layer):
    """An operation whose result is rows of K channels."""

    def __init__(self, channels: int, quantizer: RowQuantizer) -> None:
        self.channels, self.quantizer = channels, quantizer

    def value(self, result: Tensor) -> Tensor:
        """What the rows stand for."""
        return split_rows(result, self.quantizer, self.channels).dequantize()


class AddRmsNorm(FusedLayer):
    """Residual added, RMSNorm, rows."""

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, a residual, and the norm's weight."""
        return x, x.roll(1, -1), x.new_ones(self.channels)

    def __call__(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Any:
        """Rows of norm(x + residual); the sum is written, too."""
        x, residual, weight = inputs
        return add_rms_norm_quantize(x, residual, weight, EPSILON, self.quantizer)

    def value(self, result: tuple[Tensor, Tensor]) -> Tensor:
        """Of the rows."""
        return super().value(result[0])


class SiluMul(FusedLayer):
    """SiLU of the gate, times up, rows."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Rows of silu(x[:, :K]) * x[:, K:]."""
        return silu_mul_quantize(inputs, self.quantizer)


def contenders() -> list[Contender]:
    """All of ours."""
    fp8, block, int8 = ({"quantizer": q} for q in (E4M3_ROWS_OF, E4M3_BLOCK_ROWS_OF, INT8_ROWS_OF))
    linear = [
        Contender("quantkit W4A16 g128", W4, WeightOnly, ROUNDED_WEIGHTS),
        Contender("quantkit W4A16 g32 asym", W4_G32, WeightOnly, ROUNDED_WEIGHTS),
        Contender("quantkit W8A16", W8, WeightOnly, ROUNDED_WEIGHTS),
        Contender("quantkit FP8", FP8, partial(Scaled, **fp8), E4M3_ROWS),
        Contender("quantkit FP8, product", FP8, partial(ScaledProduct, **fp8), SHORT_SUMS),
        Contender("quantkit FP8 block", BLOCK_FP8, partial(Scaled, **block), E4M3_ROWS),
        Contender("quantkit FP8 block, product", BLOCK_FP8, partial(ScaledProduct, **block), EXACT),
        Contender("quantkit W8A8", INT8, partial(Scaled, **int8), INT8_ROWS),
        Contender("quantkit W8A8, product", INT8, partial(ScaledProduct, **int8), EXACT),
        Contender("quantkit LLM.int8", LLM_INT8, LlmInt8, ROUNDED_WEIGHTS, outliers=True),
    ]

    def fused(op: Op, layer: type[FusedLayer], int8_error: float) -> list[Contender]:
        rows = [
            ("quantkit FP8 rows", FP8, fp8, E4M3_ROWS),
            ("quantkit INT8 rows", INT8, int8, int8_error),
            ("quantkit FP8 block rows", BLOCK_FP8, block, E4M3_ROWS),
        ]
        return [Contender(name, kind, partial(layer, **how), e, op) for name, kind, how, e in rows]

    norm = fused("add_rms_norm", AddRmsNorm, INT8_ROWS)
    return linear + norm + fused("silu_mul", SiluMul, INT8_SILU_ROWS)
