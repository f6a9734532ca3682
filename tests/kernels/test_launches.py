"""Every launcher launches what compiles for its GPU, and nothing compiles twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from quantkit_kernels import act_quant, llm_int8, scaled_mm, wna16
from quantkit_kernels.act_quant import RowQuantizer
from quantkit_kernels.tuning import Device
from quantkit_kernels.wna16 import QuantizedWeight
from tests.kernels.aot import DEVICES
from tests.kernels.gates import MARKS
from tests.kernels.paper_gpu import paper_gpu

pytestmark = MARKS

N, K, GROUP = 384, 1024, 128
TOKENS = {90: (1, 40, 200, 2048)}
"""One of each size of tile, and of the route through cuBLAS; elsewhere the extremes."""

Run = Callable[[Tensor], object]


def weight(bits: int, group: int, code_type: str = "int") -> QuantizedWeight:
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8)
    groups = K // group
    zeros = torch.full((N, groups), 1 << (bits - 1), dtype=torch.uint8)
    index = torch.arange(K, dtype=torch.int32) // group
    return QuantizedWeight(codes, torch.rand(N, groups), zeros, index, bits, code_type)


def weight_only(bits: int, group: int, code_type: str, dtype: torch.dtype) -> Run:
    packed = wna16.pack_weight(weight(bits, group, code_type), dtype)
    return lambda x: wna16.wna16_linear(x, packed)


def scaled(quantizer: RowQuantizer, group: int, code_type: str, dtype: torch.dtype) -> Run:
    packed = scaled_mm.pack_scaled(weight(8, group, code_type), quantizer, dtype)
    return lambda x: scaled_mm.scaled_linear(act_quant.quantize_rows(x, quantizer), packed, dtype)


def outliers(dtype: torch.dtype) -> Run:
    packed = llm_int8.pack_llm_int8(weight(8, K), dtype)
    return lambda x: llm_int8.llm_int8_linear(x, packed, threshold=6.0)


def fused(dtype: torch.dtype) -> Run:
    quantizer, ones = RowQuantizer("int8"), torch.ones(K, dtype=dtype)

    def run(x: Tensor) -> None:
        act_quant.rms_norm_quantize(x, ones, 1e-6, quantizer)
        act_quant.add_rms_norm_quantize(x, x, ones, 1e-6, quantizer)
        act_quant.silu_mul_quantize(x, quantizer)

    return run


INT8 = {
    "w4a16": partial(weight_only, 4, GROUP, "int"),
    "w8a16": partial(weight_only, 8, K, "int"),
    "w8a8 int8": partial(scaled, RowQuantizer("int8", symmetric=False), K, "int"),
    "llm.int8": outliers,
    "norms": fused,
}
FP8 = {
    "w8a8 fp8": partial(scaled, RowQuantizer("e4m3"), K, "e4m3"),
    "w8a8 fp8 blocks": partial(scaled, RowQuantizer("e4m3", GROUP), GROUP, "e4m3"),
}
CASES = [
    pytest.param(device, make, id=f"sm_{device.capability} {name}")
    for device in DEVICES
    for name, make in {**INT8, **(FP8 if device.capability >= 89 else {})}.items()
]


@pytest.mark.parametrize(("device", "make"), CASES)
def test_a_launch_compiles_for_its_gpu_and_only_once(
    device: Device, make: Callable[[torch.dtype], Run]
) -> None:
    inputs = [
        torch.zeros(tokens, K, dtype=torch.bfloat16)
        for tokens in TOKENS.get(device.capability, (1, 200))
    ]
    with paper_gpu(device) as launches:
        run = make(torch.bfloat16)
        for x in inputs:
            run(x)
        first = len(launches.compiled)
        assert first > 0
        for x in inputs:
            run(x)
        assert len(launches.compiled) == first
        assert len(launches.launched) >= 2 * first
