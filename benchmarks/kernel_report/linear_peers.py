"""vLLM's Triton kernels for linear layers, with the tiles that vLLM takes on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import triton.language as tl

from benchmarks.kernel_report.sources import kernels_of
from tests.kernels.aot import DEVICES, Compiled, compile_kernel
from tests.kernels.gates import Gate

HOPPER = next(device for device in DEVICES if device.capability == 90)
WARPS = 4
W4A16_TILES = ((32, 64, 32), (64, 64, 32), (128, 128, 32))
"""(tokens, channels, columns of a step) up to 32 tokens, up to 64, beyond."""

SCALED_TILES = ((64, 64, 256), (128, 128, 128))
AWQ_TILE = (32, 32, 32)


def linear_gates(vllm: Path) -> Iterator[Gate]:
    """W4A16, AWQ, products of 8-bit codes with scales per token and channel, and per block."""
    layers = vllm / "model_executor" / "layers" / "quantization"
    w4a16 = vllm / "model_executor" / "kernels" / "linear" / "mixed_precision" / "triton_w4a16.py"
    kernel = kernels_of(w4a16).triton_w4a16_gemm_kernel
    for tile in W4A16_TILES:
        yield _gate("vLLM TritonW4A16 g128", tile, partial(_w4a16, kernel, tile))
    kernel = kernels_of(layers / "awq_triton.py").awq_gemm_kernel
    yield _gate("vLLM awq_triton g128", AWQ_TILE, partial(_awq, kernel))
    kernel = kernels_of(layers / "compressed_tensors" / "triton_scaled_mm.py").scaled_mm_kernel
    for tile in SCALED_TILES:
        yield _gate("vLLM triton_scaled_mm int8", tile, partial(_scaled, kernel, tile))
    kernel = kernels_of(layers / "utils" / "fp8_utils.py")._w8a8_triton_block_scaled_mm
    yield _gate("vLLM block FP8", (64, 128, 128), partial(_block_fp8, kernel))


def _gate(name: str, tile: tuple[int, int, int], build: Callable[[], Compiled]) -> Gate:
    tokens, channels, columns = tile

    def per_weight(compiled: Compiled) -> float:
        return compiled.main_loop.total() * WARPS * 32 / (channels * columns)

    return Gate(f"{name} {tokens}x{channels}x{columns}", HOPPER, build, per_weight)


def _compile(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], strides: tuple[str, ...]
) -> Compiled:
    """Integers are sizes and strides, all multiples of 16 but those of `strides`, which are 1."""
    constants = constants | dict.fromkeys(strides, 1)
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers
    aligned = tuple(name for name in kernel.arg_names if name not in {*constants, "M"})
    return compile_kernel(kernel, signature, constants, aligned, HOPPER.capability, WARPS)


def _w4a16(kernel: Any, tile: tuple[int, int, int]) -> Compiled:
    pointers = {
        "a_ptr": "*bf16", "b_ptr": "*i32", "scales_ptr": "*bf16", "zeros_ptr": "*i32",
        "c_ptr": "*bf16",
    }  # fmt: skip
    blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True))
    constants = {"HAS_ZP": False, "ZP_BIAS": 8} | blocks
    return _compile(kernel, pointers, constants, ("stride_ak", "stride_bn", "stride_cn"))


def _awq(kernel: Any) -> Compiled:
    pointers = {
        "a_ptr": "*fp16", "b_ptr": "*i32", "c_ptr": "*fp16", "zeros_ptr": "*i32",
        "scales_ptr": "*fp16",
    }  # fmt: skip
    constants = {f"BLOCK_SIZE_{name}": AWQ_TILE[i] for i, name in enumerate("MNK")}
    return _compile(kernel, pointers, constants | {"SPLIT_K": 8}, ())


def _scaled(kernel: Any, tile: tuple[int, int, int]) -> Compiled:
    pointers = {
        "a_ptr": "*i8", "b_ptr": "*i8", "scale_a_ptr": "*fp32", "scale_b_ptr": "*fp32",
        "c_ptr": "*bf16",
    }  # fmt: skip
    constants = {f"BLOCK_SIZE_{name}": tile[i] for i, name in enumerate("MNK")} | {
        "bias_ptr": None,
        "ACCUMULATOR_DTYPE": tl.int32,
        "BLOCK_SIZE_SCALE_A": tile[0],
        "BLOCK_SIZE_SCALE_B": tile[1],
        "USE_TD": False,
        "B_T": True,
    }
    return _compile(kernel, pointers, constants, ("stride_ak", "stride_bk", "stride_cn"))


def _block_fp8(kernel: Any) -> Compiled:
    pointers = {"A": "*fp8e4nv", "B": "*fp8e4nv", "C": "*bf16", "As": "*fp32", "Bs": "*fp32"}
    constants = {
        "group_n": 128,
        "group_k": 128,
        "BLOCK_SIZE_M": 64,
        "BLOCK_SIZE_N": 128,
        "BLOCK_SIZE_K": 128,
        "GROUP_SIZE_M": 32,
    }
    ones = ("stride_ak", "stride_bk", "stride_cn", "stride_As_k", "stride_Bs_k")
    return _compile(kernel, pointers, constants, ones)
