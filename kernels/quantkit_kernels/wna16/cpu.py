"""CPU: codes unpacked in cache or registers, products summed in float32.

Codes - zero-points are exact in bfloat16, and scales multiply each group's float32 sum, so the
weight's value is never rounded to 16 bits. Activations wider than bfloat16 are split into bfloat16
pieces whose sum is exact, or multiplied in float32 where the CPU has no bfloat16 instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.wna16.cpu_inner import PANEL, PANEL_BYTES
from quantkit_kernels.wna16.cpu_jit import ArgumentBlock, Kernel, host_kernel
from quantkit_kernels.wna16.weights import PackedWeight, UniformWeight, gather_inputs

CHUNK_ROWS = 256
"""Most rows of a task: the activations of a group, the sums and the tile take 104 KiB of cache.
At 512 rows of 4096 x 4096, 64 to 256 rows differ by less than 5 %."""

REGROUP_ROWS = 4
"""Above this many rows, activations are copied so that a group's rows lie next to each other:
rows a power of two apart would fall into the same few lines of the first-level cache."""

PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""Pieces of 8 significant bits that represent an activation exactly."""

THREAD_WORK = 16384
"""Least rows x panels x bytes of a row that are worth a second thread: about 10 us of one.
A 256 x 256 layer with one row stays on one thread, a 1536 x 256 layer does not."""

ALIGNMENT = 64
"""Bytes of a cache line and of the widest vector."""


def pack(weight: UniformWeight, dtype: torch.dtype) -> PackedWeight:
    """Panels of 32 output columns: 16 lanes load the codes of 16 columns at once.

    codes: int32 [N/32, K' * bits / 32, 32]; a word holds 32 / bits channels of one column, two's
        complement of code - centre, channel 2 i + h of the word at bit i * bits + 16 h.
    scales: float32 [N/32, G, 32].
    zeros: int8 [N/32, G, 32], zero - centre; None where all are 0, as in symmetric weights.

    N is padded to whole panels. The layout is the same for every `dtype` and CPU.
    """
    bits = weight.container_bits
    centre = _centre(weight)
    zeros = weight.zeros.to(torch.int16) - centre
    return PackedWeight(
        codes=_pack_codes(weight.codes.to(torch.int32) - centre, bits),
        scales=_panels(weight.scales.float()),
        zeros=_panels(zeros.to(torch.int8)) if bool(zeros.any()) else None,
        gather=weight.gather,
        bits=bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.codes.shape[0],
        kernel=f"CPU {host_kernel(bits).arithmetic.unit} panels (W{bits}A16)",
    )


def _centre(weight: UniformWeight) -> int:
    """The code stored as 0: the zero-point of all groups if it is one and fits, else the middle."""
    middle = 2 ** (weight.container_bits - 1)
    first = int(weight.zeros[0, 0])
    fits = first <= middle and int(weight.codes.max()) - first < middle
    return first if fits and bool((weight.zeros == first).all()) else middle


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int32 [N, K'], each a signed integer of `bits` bits, to int32 [N/32, K' * bits / 32, 32]."""
    masked = (codes & (2**bits - 1)).unflatten(1, (-1, 16 // bits, 2))
    words = torch.zeros(masked.shape[:2], dtype=torch.int32)
    for pair in range(16 // bits):
        for half in (0, 1):
            words |= masked[..., pair, half] << (pair * bits + 16 * half)
    return _panels(words)


def _panels(values: Tensor) -> Tensor:
    """[N, L] to [ceil(N / 32), L, 32], padded with zeros."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % PANEL))
    panels: Tensor = padded.unflatten(0, (-1, PANEL))
    return panels.transpose(1, 2).contiguous()


def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    gather: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    """y = [x, 0][:, gather] (scales (codes - zeros))^T + bias, accumulated in float32.

    Args:
        x: [M, K]. Others as packed by `pack`.

    Returns:
        [M, N] in the dtype of `x`.
    """
    kernel = host_kernel(bits)
    panels, groups, _ = scales.shape
    is_bf16 = x.dtype == torch.bfloat16
    out_dtype = torch.bfloat16 if is_bf16 else torch.float32
    out = torch.empty(x.shape[0], panels * PANEL, dtype=out_dtype)
    if x.shape[0]:
        pieces = split_inputs(gather_inputs(x, gather, groups * group_size), kernel)
        inputs = _lay_out(pieces, groups, with_sums=zeros is not None)
        _run(kernel, inputs, codes, scales, zeros, _pad_bias(bias, panels * PANEL), out)
    y = out if out.shape[1] == out_features else out[:, :out_features].contiguous()
    return y if is_bf16 else y.to(x.dtype)


def split_inputs(x: Tensor, kernel: Kernel) -> Tensor:
    """[P M, K'], row p M + m piece p of row m, in the dtype that the kernel multiplies.

    The pieces of a row sum to the row of x [M, K']; one piece is x itself.

    Bfloat16 pieces are cut off, not rounded: the largest finite value must not become infinite.
    """
    if kernel.arithmetic.unit == "fma":
        return x.float().contiguous()
    if x.dtype == torch.bfloat16:
        return x.contiguous()
    rest, pieces = x.float(), []
    for _ in range(PIECES[x.dtype]):
        piece = (rest.view(torch.int32) & -0x10000).view(torch.float32)
        pieces.append(piece.bfloat16())
        # Infinity - infinity is NaN; the first piece alone is to say that x is infinite.
        rest = (rest - piece).nan_to_num(nan=0.0)
    return torch.cat(pieces)


def _pad_bias(bias: Tensor | None, columns: int) -> Tensor | None:
    if bias is None:
        return None
    return torch.nn.functional.pad(bias.float(), (0, columns - bias.numel())).contiguous()


class _Inputs(NamedTuple):
    """Activations where the kernel reads them.

    Attributes:
        x: the tensor that holds them.
        rows: rows of x, those of all pieces.
        row, group: bytes from a row, and a group, to the next.
        group_size: channels in a group.
        sums: float32 [G, rows], sums over a group; None for symmetric weights.
    """

    x: Tensor
    rows: int
    row: int
    group: int
    group_size: int
    sums: Tensor | None


def _lay_out(x: Tensor, groups: int, *, with_sums: bool) -> _Inputs:
    """The groups of x [P M, K'] next to each other where there are many rows."""
    rows, columns = x.shape
    size, group_size = x.element_size(), columns // groups
    sums = None
    if with_sums:
        sums = x.view(rows, groups, group_size).sum(-1, dtype=torch.float32)
        sums = sums if rows == 1 else sums.t().contiguous()
    if rows <= REGROUP_ROWS:
        return _Inputs(x, rows, columns * size, group_size * size, group_size, sums)
    grouped = x.view(rows, groups, group_size).transpose(0, 1).contiguous()
    return _Inputs(grouped, rows, group_size * size, rows * group_size * size, group_size, sums)


def _run(
    kernel: Kernel,
    inputs: _Inputs,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out` [M, 32 * panels]."""
    plan = _plan(
        rows=out.shape[0],
        pieces=inputs.rows // out.shape[0],
        panels=codes.shape[0],
        groups=scales.shape[1],
        group_words=codes.shape[1] // scales.shape[1],
        group_bytes=inputs.group_size * inputs.x.element_size(),
        out_bf16=out.dtype == torch.bfloat16,
        max_threads=torch.get_num_threads(),
    )
    scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8)
    block = ArgumentBlock.from_buffer_copy(plan.block)
    block.x = inputs.x.data_ptr()
    block.x_row, block.x_group = inputs.row, inputs.group
    block.x_piece = out.shape[0] * inputs.row
    block.x_sums = _address(inputs.sums)
    block.x_sums_piece, block.x_sums_group = out.shape[0] * 4, inputs.rows * 4
    block.codes, block.scales = codes.data_ptr(), scales.data_ptr()
    block.zeros, block.bias = _address(zeros), _address(bias)
    block.out = out.data_ptr()
    block.scratch = -(-scratch.data_ptr() // ALIGNMENT) * ALIGNMENT
    kernel.run(block, plan.threads)


@dataclass(frozen=True)
class _Plan:
    """How a product is cut: argument block without addresses, threads, and their scratch."""

    block: ArgumentBlock
    threads: int
    scratch_bytes: int


@lru_cache(maxsize=4096)
def _plan(
    *,
    rows: int,
    pieces: int,
    panels: int,
    groups: int,
    group_words: int,
    group_bytes: int,
    out_bf16: bool,
    max_threads: int,
) -> _Plan:
    """Cut `rows` into chunks and count the threads that their tasks are worth."""
    chunks = -(-rows // CHUNK_ROWS)
    chunk_rows = -(-rows // chunks)
    tasks = chunks * panels
    work = rows * pieces * panels * groups * group_bytes
    threads = max(1, min(max_threads, tasks, work // THREAD_WORK))
    steps = group_bytes // 4
    tile_bytes = steps * PANEL_BYTES
    slot_bytes = tile_bytes + chunk_rows * PANEL_BYTES
    block = ArgumentBlock(
        tasks=tasks,
        chunks=chunks,
        chunk_rows=chunk_rows,
        rows=rows,
        groups=groups,
        group_words=group_words,
        steps=steps,
        pieces=pieces,
        out_row=panels * PANEL * (2 if out_bf16 else 4),
        out_bf16=int(out_bf16),
        slot_bytes=slot_bytes,
        tile_bytes=tile_bytes,
    )
    return _Plan(block, threads, threads * slot_bytes + ALIGNMENT)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
