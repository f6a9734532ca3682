"""CUDA: launches of the Triton kernels, for one tile or another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from quantkit_kernels.act_quant.rows import RowQuantizer
from quantkit_kernels.scaled_mm.cuda_pack import W_BLOCK
from quantkit_kernels.scaled_mm.triton_kernels import scaled_gemm
from quantkit_kernels.scaled_mm.triton_persistent import persistent_gemm
from quantkit_kernels.scaled_mm.triton_tiles import ScaledTile
from quantkit_kernels.triton_common import add_splits, device_of


@dataclass(frozen=True)
class Operands:
    """What is multiplied, as packed by `scaled_mm.triton`, and what is added.

    Attributes:
        rows: uint8 [M, stride], M at least 1.
        codes, scales, sums, zeros: of the weight.
        bias: [N] or None.
        residual: [M, N] or None.
        quantizer: how the rows are quantised.
        groups: columns that share a scale, of rows and weight; 0 where all do.
        in_features: K.
    """

    rows: Tensor
    codes: Tensor
    scales: Tensor
    sums: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    quantizer: RowQuantizer
    groups: tuple[int, int]
    in_features: int

    @property
    def x(self) -> Tensor:
        """Codes of rows as the tensor cores take them, and what follows them: [M, stride]."""
        code = self.quantizer.code
        return self.rows.view(torch.int8 if code == "int8" else torch.float8_e4m3fn)

    @property
    def w_block(self) -> int:
        """Channels that share the scales of their groups."""
        in_blocks = self.groups[1] > 0 and self.scales.shape[1] < self.codes.shape[0]
        return W_BLOCK if in_blocks else 1


def run_tiled(given: Operands, y: Tensor, tile: ScaledTile) -> None:
    """y = x W^T + bias + residual, cut as `tile` says.

    Args:
        y: [M, N], written.
    """
    # Where every channel has scales of its own at every step, Triton 3.6 spills their addresses
    # beside the persistent kernel's own. The narrow persistent tile fits the other kernel too.
    if tile.persistent and (given.groups[1] == 0 or given.w_block == W_BLOCK):
        _run_persistent(given, y, tile)
        return
    m, n = y.shape
    split = tile.splits > 1
    out = torch.empty(tile.splits, m, n, dtype=torch.float32, device=y.device) if split else y
    k_steps = triton.cdiv(given.in_features, tile.block_k)
    tiles = triton.cdiv(n, tile.block_n) * triton.cdiv(m, tile.block_m)
    scaled_gemm[(tiles, tile.splits)](
        given.x,
        given.rows.view(torch.float32),
        given.codes,
        given.scales,
        given.sums,
        given.zeros,
        None if split else given.bias,
        None if split else given.residual,
        out,
        m,
        n,
        given.in_features,
        given.rows.shape[1],
        given.codes.shape[1],
        k_steps,
        triton.cdiv(k_steps, tile.splits),
        RAGGED=given.in_features % tile.block_k != 0,
        SWAP=tile.swap,
        **_constants(given, tile),
    )
    if split:
        add_splits(out, given.bias, y, given.residual)


def _run_persistent(given: Operands, y: Tensor, tile: ScaledTile) -> None:
    m, n = y.shape
    tiles = triton.cdiv(n, tile.block_n) * triton.cdiv(m, tile.block_m)
    persistent_gemm[(min(tiles, device_of(y).multiprocessors),)](
        _descriptor(given.x, given.in_features, tile.block_m, tile.block_k),
        given.rows.view(torch.float32),
        _descriptor(given.codes, given.codes.shape[1], tile.block_n, tile.block_k),
        given.scales,
        given.sums,
        given.zeros,
        given.bias,
        given.residual,
        y,
        m,
        n,
        given.rows.shape[1] // 4,
        triton.cdiv(given.in_features, tile.block_k),
        **_constants(given, tile),
    )


def _descriptor(codes: Tensor, columns: int, block_rows: int, block_k: int) -> TensorDescriptor:
    """What TMA reads blocks of codes [rows, stride] by: beyond `columns` they are 0.

    The driver encodes it on the host, without asking the GPU, and hands it over by value with the
    launch's other arguments. So a CUDA graph keeps it as it keeps their addresses, and replays are
    as safe. Encoding takes a microsecond: too little, beside a product of this size, to keep
    descriptors for.
    """
    shape, strides = [codes.shape[0], columns], [codes.shape[1], 1]
    return TensorDescriptor(codes, shape, strides, [block_rows, block_k])


def _constants(given: Operands, tile: ScaledTile) -> dict[str, int | bool]:
    """What both kernels are compiled for."""
    return {
        "X_GROUP": given.groups[0],
        "W_GROUP": given.groups[1],
        "W_BLOCK": given.w_block,
        "SCALES_AT": given.quantizer.layout(given.in_features).scales_at // 4,
        "BM": tile.block_m,
        "BN": tile.block_n,
        "BK": tile.block_k,
        "STAGES": tile.stages,
        "ASM": given.rows.is_cuda,
        "num_warps": tile.warps,
        "enable_fp_fusion": True,
    }
