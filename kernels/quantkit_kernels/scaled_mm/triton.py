"""CUDA: packs for and launches the Triton kernel.

No launch synchronises or depends on values, so all may be captured in a CUDA graph.
"""

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowCode, RowQuantizer
from quantkit_kernels.code_types import CodeType
from quantkit_kernels.scaled_mm import cuda_pack
from quantkit_kernels.scaled_mm.cuda_pack import block_k, kernel_groups
from quantkit_kernels.scaled_mm.triton_launch import Operands, run_tiled
from quantkit_kernels.scaled_mm.weights import ScaledWeight, row_quantizer
from quantkit_kernels.tile_choice import scaled_tile
from quantkit_kernels.triton_common import device_of
from quantkit_kernels.wna16.weights import QuantizedWeight

FLOAT8_CAPABILITY = 89
"""The first GPUs whose tensor cores multiply FP8: Ada, capability 8.9."""


def pack(weight: QuantizedWeight, quantizer: RowQuantizer, dtype: torch.dtype) -> ScaledWeight:
    """As `cuda_pack` lays it out, if this GPU can multiply it.

    Raises:
        ValueError: the GPU has no FP8 tensor cores, or groups are no multiples of 32 channels.
    """
    capability = device_of(weight.codes).capability
    if weight.code_type != "int" and capability < FLOAT8_CAPABILITY:
        raise ValueError(
            f"a GPU of capability {capability / 10} has no FP8 tensor cores, which take 8.9; use "
            "the weight with 16-bit activations"
        )
    return cuda_pack.pack(weight, quantizer, dtype)


def linear(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    code_type: CodeType,
    row_code: RowCode,
    row_group: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """y = (sx (xq - zx)) (sw (value(codes) - zeros))^T + bias + residual.

    Args:
        rows: uint8 [M, stride], as `row_quantizer` lays them out.
        residual: [M, N] or None.
        code_type: told by the dtype of `codes` here. Others as packed by `pack`.

    Returns:
        [M, N] in `dtype`.
    """
    m = rows.shape[0]
    y = torch.empty(m, out_features, dtype=dtype, device=rows.device)
    if m == 0:
        return y
    quantizer = row_quantizer(row_code, row_group, in_features, zeros is not None)
    groups = kernel_groups(quantizer, in_features, group_size)
    given = Operands(
        rows=rows.contiguous(),
        codes=codes,
        scales=scales,
        sums=sums,
        zeros=zeros,
        bias=bias,
        residual=None if residual is None else residual.contiguous(),
        quantizer=quantizer,
        groups=groups,
        in_features=in_features,
    )
    with torch.cuda.device_of(rows):
        shape, step = (m, out_features, in_features), (block_k(*groups), max(groups) > 0)
        tile = scaled_tile(*shape, *step, code_type, device_of(rows))
        run_tiled(given, y, tile)
    return y
