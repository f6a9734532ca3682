"""What the tile choices of all Triton kernels share.

The GPU, the buckets of tokens that are cut alike, how many programs share k, and whether a token's
result may depend on the others of its batch.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

TILE_K = 128
"""Columns of one step along k, fixed by the weight layout."""

MIN_SPLIT_TILES = 4
"""A split shorter than this many k tiles spends its time filling the pipeline."""

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
"""Numbers of tokens for which tiles are chosen; the last stands for all beyond 4096.

Closer together where the tiles of a product are about as many as a GPU has multiprocessors.
"""

INVARIANT_TOKENS = 64
"""Where batches are invariant, every product is cut as that of so many tokens, without splits.

Small enough not to waste most of a decode step's arithmetic, large enough for a prompt's.
"""


@dataclass(frozen=True)
class Device:
    """What a tile choice depends on.

    Attributes:
        capability: 10 * major + minor of the compute capability.
        multiprocessors: how many there are.
        shared_bytes: shared memory that one program may use.
        name: as `torch.cuda.get_device_name` says it; tables of measured tiles go by it.
    """

    capability: int
    multiprocessors: int
    shared_bytes: int
    name: str


def bucket_of(m: int) -> int:
    """The most tokens that are cut as `m` are: the next of `BUCKETS`.

    A layer so has few tiles, which can all be compiled before the first request.

    Args:
        m: tokens, at least 1.
    """
    return BUCKETS[min(bisect_left(BUCKETS, m), len(BUCKETS) - 1)]


def bucket_starts(most: int) -> tuple[int, ...]:
    """The fewest tokens of every bucket that numbers up to `most` fall into."""
    starts = (1, *(bucket + 1 for bucket in BUCKETS[:-1]))
    return tuple(start for start in starts if start <= most)


class _Invariance:
    """Whether batches are invariant: state of the process, as the numerics of torch are."""

    on = False


def batch_invariant() -> bool:
    """Whether one token's result has the same bits in every batch; read at every launch."""
    return _Invariance.on


def set_batch_invariant(on: bool) -> None:
    """Let products be cut alike for every number of tokens, or each as it is fastest."""
    _Invariance.on = on


def wanted_splits(programs: int, block_m: int, device: Device) -> int:
    """Splits that fill the GPU in one wave: two small programs on a multiprocessor, or one big."""
    resident = 2 if block_m <= 64 else 1
    return max(1, resident * device.multiprocessors // programs)


def allowed_splits(m: int, columns: int, bits: int) -> int:
    """Splits that stay long enough and whose fp32 sums weigh no more than the weights.

    splits * m * n * 4 bytes, written and read, against n * columns * bits / 8 bytes.
    """
    return max(1, min(columns // TILE_K // MIN_SPLIT_TILES, columns * bits // (64 * m)))


def whole_splits(splits: int, k_tiles: int) -> int:
    """The splits that are left when each takes ceil(k tiles / splits) k tiles."""
    return -(-k_tiles // -(-k_tiles // splits))
