"""CUDA: packs for and launches the Triton kernel.

Codes are row-major, [N', K''] with both padded to multiples of 128, so that a step of the kernel
reads whole cache lines of every row. No launch synchronises or depends on values, so all may be
captured in a CUDA graph.
"""

import math

import torch
import triton
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowCode, RowQuantizer
from quantkit_kernels.code_types import FLOAT8_DTYPES, CodeType
from quantkit_kernels.scaled_mm.triton_kernels import scaled_gemm
from quantkit_kernels.scaled_mm.triton_tiles import ScaledTile, select_scaled_tile
from quantkit_kernels.scaled_mm.weights import INT8_ZERO, ScaledWeight, group_size_of
from quantkit_kernels.triton_common import add_splits, device_of
from quantkit_kernels.tuning import TILE_K
from quantkit_kernels.wna16.cuda_layout import padded_columns, padded_rows
from quantkit_kernels.wna16.weights import QuantizedWeight

FLOAT8_CAPABILITY = 89
"""The first GPUs whose tensor cores multiply FP8: Ada, capability 8.9."""

SMALLEST_GROUP = 32
"""Columns of the shortest 8-bit product that tensor cores make; groups are multiples of it."""


def pack(weight: QuantizedWeight, quantizer: RowQuantizer, dtype: torch.dtype) -> ScaledWeight:
    """Codes [N', K''] of the type that the tensor cores take, scales fp32 [G, N'].

    Integers become code - 128. Padding has the value 0.

    Raises:
        ValueError: the GPU has no FP8 tensor cores, or groups are no multiples of 32 channels.
    """
    rows, columns = weight.codes.shape
    group_size = group_size_of(weight)
    _check_served(weight, quantizer, group_size)
    padding = (0, padded_columns(columns) - columns, 0, padded_rows(rows) - rows)
    integer = weight.code_type == "int"
    stored = weight.codes ^ INT8_ZERO if integer else weight.codes
    codes = torch.nn.functional.pad(stored, padding).view(code_dtype(weight.code_type))
    sums = None if quantizer.symmetric else codes.sum(1, dtype=torch.int32)
    scales = torch.nn.functional.pad(weight.scales.float().T, (0, padding[3]))
    return ScaledWeight(
        codes=codes,
        scales=scales.contiguous(),
        sums=sums,
        code_type=weight.code_type,
        quantizer=quantizer,
        group_size=group_size,
        in_features=columns,
        out_features=rows,
        kernel=f"Triton W8A8 {'INT8' if integer else 'FP8'}, tensor cores",
    )


def linear(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    code_type: CodeType,
    row_code: RowCode,
    row_group: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """y[m, n] = sum_k sx[m, gx(k)] (xq[m, k] - zx[m]) sw[n, gw(k)] value(codes[n, k]) + bias[n].

    Args:
        rows: uint8 [M, stride], as `RowQuantizer(row_code, row_group)` lays them out.
        code_type: told by the dtype of `codes` here. Others as packed by `pack`.

    Returns:
        [M, N] in `dtype`.
    """
    m = rows.shape[0]
    y = torch.empty(m, out_features, dtype=dtype, device=rows.device)
    if m == 0:
        return y
    quantizer = RowQuantizer(row_code, row_group)
    groups = kernel_groups(quantizer, in_features, group_size)
    with torch.cuda.device_of(rows):
        tile = select_scaled_tile(
            m, out_features, in_features, block_k(*groups), max(groups) > 0, device_of(rows)
        )
        run_tiled(rows, codes, scales, sums, bias, quantizer, groups, in_features, y, tile)
    return y


def run_tiled(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    quantizer: RowQuantizer,
    groups: tuple[int, int],
    in_features: int,
    y: Tensor,
    tile: ScaledTile,
) -> None:
    """As `linear`, cut as `tile` says.

    Args:
        rows: uint8 [M, stride], M at least 1.
        groups: of `kernel_groups`.
        y: [M, N], written.
    """
    m, n = y.shape
    split = tile.splits > 1
    out = torch.empty(tile.splits, m, n, dtype=torch.float32, device=y.device) if split else y
    k_steps = triton.cdiv(in_features, tile.block_k)
    tiles = triton.cdiv(n, tile.block_n) * triton.cdiv(m, tile.block_m)
    rows = rows.contiguous()
    scaled_gemm[(tiles, tile.splits)](
        rows.view(torch.int8 if quantizer.code == "int8" else torch.float8_e4m3fn),
        rows.view(torch.float32),
        codes,
        scales,
        sums,
        None if split else bias,
        out,
        m,
        n,
        in_features,
        rows.shape[1],
        codes.shape[1],
        k_steps,
        triton.cdiv(k_steps, tile.splits),
        X_GROUP=groups[0],
        W_GROUP=groups[1],
        SCALES_AT=quantizer.layout(in_features).scales_at // 4,
        RAGGED=in_features % tile.block_k != 0,
        SWAP=tile.swap,
        BM=tile.block_m,
        BN=tile.block_n,
        BK=tile.block_k,
        STAGES=tile.stages,
        ASM=rows.is_cuda,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
    if split:
        add_splits(out, bias, y)


def kernel_groups(quantizer: RowQuantizer, in_features: int, group_size: int) -> tuple[int, int]:
    """Columns that share a scale, of the rows and of the weight; 0 where a whole row does."""
    grouped_rows = quantizer.layout(in_features).groups > 1
    return (
        quantizer.group_size if grouped_rows else 0,
        group_size if group_size < in_features else 0,
    )


def block_k(x_group: int, w_group: int) -> int:
    """Columns of a step, which has one scale: at most 128, and a divisor of both groups."""
    return math.gcd(TILE_K, x_group, w_group)


def code_dtype(code_type: CodeType) -> torch.dtype:
    """The dtype in which the tensor cores take codes of a type."""
    return torch.int8 if code_type == "int" else FLOAT8_DTYPES[code_type]


def _check_served(weight: QuantizedWeight, quantizer: RowQuantizer, group_size: int) -> None:
    capability = device_of(weight.codes).capability
    if weight.code_type != "int" and capability < FLOAT8_CAPABILITY:
        raise ValueError(
            f"a GPU of capability {capability / 10} has no FP8 tensor cores, which take 8.9; use "
            "the weight with 16-bit activations"
        )
    step = block_k(*kernel_groups(quantizer, weight.codes.shape[1], group_size))
    if step < SMALLEST_GROUP:
        raise ValueError(
            f"groups of {group_size} channels are not served; use a multiple of {SMALLEST_GROUP}"
        )
