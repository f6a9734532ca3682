"""Plans a product on the CPU and runs it: tasks, threads, scratch, and the argument block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quantkit_kernels.cpu.arithmetic import PANEL, PANEL_BYTES
from quantkit_kernels.cpu.host import ArgumentBlock, Kernel

CHUNK_ROWS = 256
"""Most rows of a task: the activations of a group, the sums and the tile take 104 KiB of cache.
At 512 rows of 4096 x 4096, 64 to 256 rows differ by less than 5 %."""

THREAD_WORK = 16384
"""Least rows x panels x bytes of a row that are worth a second thread: about 10 us of one.
A 256 x 256 layer with one row stays on one thread, a 1536 x 256 layer does not."""

ALIGNMENT = 64
"""Bytes of a cache line and of the widest vector."""


@dataclass(frozen=True)
class Plan:
    """How a product is cut.

    Attributes:
        block: arguments without the addresses of tensors.
        threads: to run it on.
        scratch_bytes: for all threads.
        staged_bytes: for staged rows, a multiple of `ALIGNMENT`; 0 where none are.
    """

    block: ArgumentBlock
    threads: int
    scratch_bytes: int
    staged_bytes: int = 0


@lru_cache(maxsize=4096)
def plan(
    *,
    rows: int,
    pieces: int,
    panels: int,
    groups: int,
    group_words: int,
    steps: int,
    weight_pieces: int,
    out_bf16: bool,
    max_threads: int,
) -> Plan:
    """Cut `rows` into chunks and count the threads that their tasks are worth.

    Args:
        rows: M.
        pieces: numbers that sum to an activation.
        panels: of 32 output columns.
        groups: of input channels.
        group_words: words of a group's codes in one column.
        steps: of 32 bits that a group's channels take in a row.
        weight_pieces: numbers that sum to a weight.
        out_bf16: results are bfloat16, else float32.
        max_threads: to use.
    """
    chunks = -(-rows // CHUNK_ROWS)
    chunk_rows = -(-rows // chunks)
    tasks = chunks * panels
    work = rows * pieces * panels * groups * steps * 4
    threads = max(1, min(max_threads, tasks, work // THREAD_WORK))
    tile_bytes = steps * weight_pieces * PANEL_BYTES
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
    return Plan(block, threads, threads * slot_bytes)


def new_block(chosen: Plan) -> ArgumentBlock:
    """The plan's argument block, for one call to fill in."""
    return ArgumentBlock.from_buffer_copy(chosen.block)


def run(kernel: Kernel, chosen: Plan, block: ArgumentBlock) -> None:
    """Compute all tasks of a block whose addresses are filled in."""
    size = chosen.staged_bytes + chosen.scratch_bytes + ALIGNMENT
    memory = torch.empty(size, dtype=torch.uint8)
    start = -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT
    block.scratch = start + chosen.staged_bytes
    if chosen.staged_bytes:
        block.x = start
    kernel.run(block, chosen.threads)


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
