"""Which kernel of this package runs a layer on a device, and why that one."""

from __future__ import annotations

import torch

from quantkit_kernels.targets import Target
from quantkit_kernels.wna16.names import CPU_CONTAINERS, CUDA_CONTAINERS, container
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.schemes.linear import linear_scheme
from vllm_quantkit.schemes.w8a8 import target_lacks_fp8
from vllm_quantkit.spec import Frozen, SchemeSpec

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""Words of `--dtype` to what they are."""

UNITS = {
    "bf16": "this CPU multiplies bfloat16 (AVX512-BF16)",
    "vnni": "this CPU multiplies 8-bit integers (AVX512-VNNI)",
    "fma": "this CPU has neither AVX512-BF16 nor AVX512-VNNI for it, so float32 vectors multiply",
}
"""Why a unit of arithmetic is taken."""


class Foreseen(Frozen):
    """A kernel that a layer will run.

    Attributes:
        name: as the engine's log calls it.
        reason: why that one.
        warning: what works otherwise than one may expect; empty for nothing.
    """

    name: str
    reason: str
    warning: str = ""


def foresee(spec: SchemeSpec, device: Device, dtype: str, *, fixed_outliers: bool) -> Foreseen:
    """What runs a layer on a device, which need not be here unless it is a CPU.

    Args:
        spec: how the layer is stored and multiplied.
        device: where.
        dtype: of activations, a word of `DTYPES`.
        fixed_outliers: True where statistics of the layer's inputs are given.
    """
    target = target_for(device)
    name = linear_scheme(spec).kernel_name(target, DTYPES[dtype], fixed_outliers=fixed_outliers)
    if target.device_type == "cpu":
        return Foreseen(name=name, reason=_cpu_reason(spec, target))
    lacks = spec.weight.code_type in ("e4m3", "e5m2") and target_lacks_fp8(target)
    warning = _no_fp8(device) if lacks and spec.activation is not None else ""
    return Foreseen(name=name, reason=_cuda_reason(spec, device, dtype), warning=warning)


def target_for(device: Device) -> Target:
    """What the choice of a kernel depends on; a CPU is always this machine's."""
    if device.kind == "cuda":
        return Target("cuda", device.capability)
    from quantkit_kernels.cpu.host import host_features

    return Target("cpu", features=host_features())


def _cpu_reason(spec: SchemeSpec, target: Target) -> str:
    from quantkit_kernels.cpu.host import Product, arithmetic_for

    weight, activation = spec.weight, spec.activation
    bits = container(weight.bits, CPU_CONTAINERS)
    row_code = None if activation is None else activation.code
    unit = arithmetic_for(Product(bits, weight.code_type, row_code), target.features).unit
    return f"{UNITS[unit]}; {_stored(spec, bits)}"


def _cuda_reason(spec: SchemeSpec, device: Device, dtype: str) -> str:
    weight, activation = spec.weight, spec.activation
    bits = container(weight.bits, CUDA_CONTAINERS)
    if activation is not None and weight.code_type == "int":
        return f"tensor cores multiply 8-bit integers; {_stored(spec, bits)}"
    if activation is not None and device.multiplies_fp8:
        return f"tensor cores multiply FP8 (compute capability {capability(device)})"
    route = "tensor cores multiply them"
    if dtype == "float32":
        route = "cuBLAS multiplies them, since tensor cores take no float32"
    return f"weights are dequantised to {dtype} and {route}; {_stored(spec, bits)}"


def _stored(spec: SchemeSpec, bits: int) -> str:
    weight = spec.weight
    if bits != weight.bits:
        return f"{weight.bits}-bit codes are stored in {bits} bits"
    if spec.activation is not None and spec.activation.outlier_threshold is not None:
        return "channels with outliers are multiplied apart"
    return f"weights stay in {bits} bits"


def _no_fp8(device: Device) -> str:
    return (
        f"FP8 layers run weight-only on {device.name}, because compute capability "
        f"{capability(device)} has no FP8 arithmetic, which takes 8.9: memory is saved, arithmetic "
        f"is not; quantkit-smoothquant multiplies in 8 bits there."
    )


def capability(device: Device) -> str:
    """A compute capability as people write it."""
    return ".".join(map(str, device.capability or ()))
