"""What the log calls the kernels of LLM.int8(), packed or only foreseen."""

from __future__ import annotations

from quantkit_kernels.llm_int8.reference import ROWS
from quantkit_kernels.scaled_mm import names as scaled_names
from quantkit_kernels.targets import Target


def named(scaled: str) -> str:
    """The kernel whose other channels the kernel `scaled` multiplies."""
    return f"LLM.int8: outlier channels in 16 bits, others by {scaled}"


def kernel_name(target: Target) -> str:
    """The kernel that `pack_llm_int8` packs for on a target, which need not be here."""
    return named(scaled_names.kernel_name(target, "int", ROWS.code))
