"""What the log calls the kernels of 8-bit activations, packed or only foreseen."""

from __future__ import annotations

from quantkit_kernels.act_quant.rows import RowCode
from quantkit_kernels.code_types import CodeType
from quantkit_kernels.targets import Target

GENERIC_NAME = "dequantise + ATen (W8A8)"
"""The kernel of `generic`."""


def cpu_name(code_type: CodeType, unit: str) -> str:
    """The kernel of `cpu`, by its unit of arithmetic."""
    return f"CPU {unit} panels (W8A8 {'INT8' if code_type == 'int' else code_type.upper()})"


def cuda_name(code_type: CodeType) -> str:
    """The kernel of `triton`."""
    return f"Triton W8A8 {'INT8' if code_type == 'int' else 'FP8'}, tensor cores"


def kernel_name(target: Target, code_type: CodeType, row_code: RowCode) -> str:
    """The kernel that `pack_scaled` packs for on a target, which need not be here.

    Args:
        target: where it runs.
        code_type: what a weight's code stands for.
        row_code: what an activation's code stands for.
    """
    if target.device_type == "cuda":
        return cuda_name(code_type)
    if target.device_type == "cpu":
        from quantkit_kernels.cpu.host import Product, arithmetic_for

        unit = arithmetic_for(Product(8, code_type, row_code), target.features).unit
        return cpu_name(code_type, unit)
    return GENERIC_NAME
