"""vLLM's Triton kernels that quantise activations, alone or fused with silu(gate) * up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.kernel_report.linear_peers import HOPPER
from benchmarks.kernel_report.sources import kernels_of
from tests.kernels.aot import Compiled, compile_kernel
from tests.kernels.gates import Gate
from tests.kernels.sass import instructions

WIDTH = 4096
GROUP = 128
E4M3 = {"fp8_min": -448.0, "fp8_max": 448.0}


def quant_gates(vllm: Path) -> Iterator[Gate]:
    """Per token to INT8, per group to FP8, and silu(gate) * up per group to FP8; no fused norm."""
    utils = vllm / "model_executor" / "layers" / "quantization" / "utils"
    int8, fp8 = kernels_of(utils / "int8_utils.py"), kernels_of(utils / "fp8_utils.py")
    rows = partial(_per_token, int8._per_token_quant_int8)
    yield _gate("vLLM per_token_quant_int8 4096", rows, WIDTH, 8)
    groups = partial(_per_group, fp8._per_token_group_quant_fp8)
    yield _gate("vLLM per_token_group_quant_fp8 g128", groups, GROUP, 1)
    gated = partial(_silu_mul, fp8._silu_mul_per_token_group_quant_fp8_colmajor)
    yield _gate("vLLM silu_mul_per_token_group_quant_fp8 g128", gated, 8 * GROUP, 4)


def _gate(name: str, build: Callable[[], Compiled], channels: int, warps: int) -> Gate:
    def per_channel(compiled: Compiled) -> float:
        return len(instructions(compiled.sass)) * warps * 32 / channels

    return Gate(name, HOPPER, build, per_channel)


def _per_token(kernel: Any) -> Compiled:
    types = {"x_ptr": "*bf16", "xq_ptr": "*i8", "scale_ptr": "*fp32"}
    types |= dict.fromkeys(("stride_x", "stride_xq", "N"), "i32")
    return compile_kernel(kernel, types, {"BLOCK": WIDTH}, tuple(types), HOPPER.capability, 8)


def _per_group(kernel: Any) -> Compiled:
    types = {"y_ptr": "*bf16", "y_q_ptr": "*fp8e4nv", "y_s_ptr": "*fp32"}
    types |= dict.fromkeys(("group_size", "y_num_columns", "y_row_stride"), "i32")
    constants = E4M3 | {"use_ue8m0": False, "BLOCK": GROUP}
    aligned = tuple(types)
    return compile_kernel(kernel, types | {"eps": "fp32"}, constants, aligned, HOPPER.capability, 1)


def _silu_mul(kernel: Any) -> Compiled:
    types = {"y_ptr": "*bf16", "y_q_ptr": "*fp8e4nv", "y_s_ptr": "*fp32"}
    types |= {"M": "i32", "N": "i32", "y_s_col_stride": "i64"}
    floats = dict.fromkeys(("eps", "clamp_limit", "alpha", "beta"), "fp32")
    constants = E4M3 | {
        "expert_ends_ptr": None,
        "use_ue8m0": False,
        "HAS_CLAMP": False,
        "GROUP_SIZE": GROUP,
        "BLOCK_M": 8,
        "BLOCK_N": GROUP,
        "EXPERT_ALIGNMENT": 0,
    }
    aligned = tuple(types)
    return compile_kernel(kernel, types | floats, constants, aligned, HOPPER.capability, 4)
