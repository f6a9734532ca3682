"""cuBLAS, and peers that bring their own package: GemLite and bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contender import INT8_ROWS, ROUNDED, Contender, Layer
from benchmarks.gpu.ours import OUTLIER_THRESHOLD
from benchmarks.gpu.problems import BF16, LLM_INT8, W4
from quantkit_kernels.wna16 import QuantizedWeight

CUBLAS = "cuBLAS bf16"

GEMLITE_TUNED_FOR = "h100"
"""GemLite ships no choices for an H200, whose multiprocessors are the H100's."""


class Cublas(Layer):
    """16 bits: the dequantised weight, rounded."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight.dequantize().bfloat16()

    def __call__(self, inputs: Tensor) -> Tensor:
        """y = x W^T."""
        return torch.nn.functional.linear(inputs, self.weight)


class GemLite(Layer):
    """GemLite's Triton kernels for 4-bit weights in groups, scales in bfloat16.

    Raises:
        ImportError: GemLite is not installed.
        ValueError: it was not tuned for such a layer, and would tune itself for minutes.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        import gemlite
        from gemlite.helper import A16W4_HQQ_INT

        shipped = Path(gemlite.__file__).parent / "configs" / f"{GEMLITE_TUNED_FOR}.json"
        n, k = weight.codes.shape
        if f", {n}, {k}, " not in shipped.read_text():
            raise ValueError(f"GemLite brings no choices for {n} x {k}")
        gemlite.load_config(str(shipped))
        device = str(weight.codes.device)
        helper = A16W4_HQQ_INT(device=device, dtype=torch.bfloat16)
        scales = weight.scales.bfloat16()
        self.layer = helper.from_weights(weight.codes, scales, weight.zeros.bfloat16())

    def __call__(self, inputs: Tensor) -> Any:
        """y = x W^T."""
        return self.layer(inputs)


class BitsAndBytes(Layer):
    """bitsandbytes' LLM.int8, which casts x to float16 and waits for the GPU to count outliers.

    Raises:
        ImportError: bitsandbytes is not installed.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        import bitsandbytes

        self.state = bitsandbytes.MatmulLtState()
        self.state.CB = (weight.codes ^ 128).view(torch.int8)
        self.state.SCB = weight.scales[:, 0] * 127
        self.state.has_fp16_weights = self.state.is_training = False
        self.state.threshold = OUTLIER_THRESHOLD

    def prepare(self, x: Tensor) -> Tensor:
        """x in float16, so that the cast is not timed."""
        return x.half()

    def __call__(self, inputs: Tensor) -> Any:
        """y = x_O W_O^T + Q(x_rest) W_rest^T."""
        import bitsandbytes

        return bitsandbytes.matmul(inputs, self.state.CB, state=self.state)


def contenders() -> list[Contender]:
    """All of them."""
    return [
        Contender(CUBLAS, BF16, Cublas, ROUNDED),
        Contender("GemLite W4A16 g128", W4, GemLite, ROUNDED),
        # x is quantised, but for the outliers, which are most of it.
        Contender(
            "bitsandbytes LLM.int8", LLM_INT8, BitsAndBytes, INT8_ROWS, outliers=True, graph=False
        ),
    ]
