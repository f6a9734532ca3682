# ruff: noqa: ANN001
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the launchers of all Triton kernels share: the GPU, and the sum over splits of k."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.tuning import Device

SUM_BLOCK = 512
"""Output channels that one program of `sum_splits` adds up."""

INTERPRETED = Device(90, multiprocessors=132, shared_bytes=227 * 1024, name="Triton interpreter")
"""The device that tensors on the CPU stand for; only the interpreter sees them."""


@triton.jit(do_not_specialize=["M", "splits"])
def sum_splits(  # noqa: ANN201
    partial_ptr, bias_ptr, residual_ptr, out_ptr, M, N, splits, BLOCK: tl.constexpr
):
    """out[m, n] = sum_s partial[s, m, n] + bias[n] + residual[m, n], added in the order of s.

    Args:
        partial_ptr: float32 [splits, M, N].
        bias_ptr: [N] or None.
        residual_ptr: [M, N] or None.
        out_ptr: [M, N].
    """
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offsets = tl.program_id(1) * N + columns
    inside = columns < N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * M * N + offsets, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


def add_splits(
    partial: Tensor, bias: Tensor | None, y: Tensor, residual: Tensor | None = None
) -> None:
    """y = sum_s partial[s] + bias + residual, in that order.

    Args:
        partial: float32 [splits, M, N].
        bias: [N] or None.
        y: [M, N], written.
        residual: contiguous [M, N] or None.
    """
    splits, m, n = partial.shape
    grid = (triton.cdiv(n, SUM_BLOCK), m)
    sum_splits[grid](
        partial, bias, residual, y, m, n, splits, BLOCK=SUM_BLOCK, enable_fp_fusion=True
    )


def device_of(x: Tensor) -> Device:
    """The GPU of `x`."""
    return _cuda_device(x.get_device()) if x.is_cuda else INTERPRETED


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        capability=10 * properties.major + properties.minor,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        name=properties.name,
    )
