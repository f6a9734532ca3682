"""What the log calls the kernels of 16-bit activations, packed or only foreseen."""

from __future__ import annotations

import torch

from quantkit_kernels.code_types import CodeType
from quantkit_kernels.targets import Target

CPU_CONTAINERS = (4, 8)
"""Widths in which the CPU's kernels store codes."""

CUDA_CONTAINERS = (2, 4, 8)
"""The same on CUDA devices. 3 bits in a word of their own would take more instructions per weight
than the memory they save is worth."""

GENERIC_CONTAINERS = (2, 4, 8)
"""The same elsewhere."""


def cpu_name(bits: int, code_type: CodeType, unit: str) -> str:
    """The kernel of `cpu`, by its container's width and its unit of arithmetic."""
    return f"CPU {unit} panels (W{bits}A16{_suffix(code_type)})"


def cuda_name(bits: int, code_type: CodeType, dtype: torch.dtype) -> str:
    """The kernel of `triton`; activations of float32 are too wide for the tensor cores."""
    route = "dequantise + cuBLAS" if dtype == torch.float32 else "tensor cores"
    return f"Triton W{bits}A16{_suffix(code_type)}, {route}"


def generic_name(bits: int) -> str:
    """The kernel of `generic`."""
    return f"dequantise + ATen (W{bits}A16)"


def kernel_name(target: Target, bits: int, code_type: CodeType, dtype: torch.dtype) -> str:
    """The kernel that `pack_weight` packs for on a target, which need not be here.

    Args:
        target: where it runs.
        bits: of a weight's code, 2 to 8.
        code_type: what a code stands for.
        dtype: of the activations.
    """
    if target.device_type == "cuda":
        return cuda_name(container(bits, CUDA_CONTAINERS), code_type, dtype)
    if target.device_type == "cpu":
        from quantkit_kernels.cpu.host import Product, arithmetic_for

        width = container(bits, CPU_CONTAINERS)
        unit = arithmetic_for(Product(width, code_type), target.features).unit
        return cpu_name(width, code_type, unit)
    return generic_name(container(bits, GENERIC_CONTAINERS))


def container(bits: int, containers: tuple[int, ...]) -> int:
    """The narrowest of these widths, ascending, that holds codes of `bits` bits."""
    return next(width for width in containers if bits <= width)


def _suffix(code_type: CodeType) -> str:
    return "" if code_type == "int" else f" {code_type.upper()}"
