"""Batch invariance (`VLLM_BATCH_INVARIANT`): which layers give a token the same bits in any batch.

On GPUs, those whose numerics look at one token at a time: one tile then cuts a layer's product for
every number of tokens (see `quantkit_kernels.tuning`). Attention, and layers left in 16 bits, are
vLLM's. On CPUs vLLM makes no such promise, and of our products only those of INT8 activations,
whose sums are exact, would keep it: the others multiply one token in another order than several.
"""

from __future__ import annotations

import torch

from quantkit_kernels.act_quant import PER_TENSOR
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.spec import SchemeSpec


def check_invariant(
    prefix: str,
    spec: SchemeSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fixed_outliers: bool,
) -> None:
    """A layer's results for a token do not depend on the batch.

    Args:
        prefix: the layer's name.
        spec: its numerics.
        device, dtype: of its activations.
        fixed_outliers: statistics say which channels have outliers.

    Raises:
        UnsupportedScheme: they do; says why and what to do.
    """
    reason, fix = _dependence(spec, device, dtype, fixed_outliers)
    if reason:
        raise UnsupportedScheme(
            f"VLLM_BATCH_INVARIANT is set, but {reason}, so results of layer {prefix} depend on "
            f"the batch. Unset it, or use {fix}."
        )


def _dependence(
    spec: SchemeSpec, device: torch.device, dtype: torch.dtype, fixed_outliers: bool
) -> tuple[str, str]:
    """Why results depend on the batch, and what does not; both empty where they do not."""
    activation = spec.activation
    if device.type != "cuda":
        return f"a {device.type} multiplies one token in another order than several", "a GPU"
    if dtype == torch.float32:
        return "cuBLAS multiplies float32 as suits the batch", "--dtype bfloat16"
    if activation is None:
        return "", ""
    if activation.outlier_threshold is not None and not fixed_outliers:
        return "LLM.int8 looks for outliers in all tokens", "activation_stats, which fix them"
    if activation.dynamic and activation.group_size == PER_TENSOR:
        return "one scale is made for all tokens", "a checkpoint with static or per-token scales"
    return "", ""
