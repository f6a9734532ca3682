"""What an attention kernel on the CPU is generated for, and how its scratch memory is laid out."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit_kernels.act_quant.cpu_math import Float
from quantkit_kernels.cpu.ir import LANES
from quantkit_kernels.kv_int4.cpu_entry import VECTOR_BYTES
from quantkit_kernels.kv_int4.layout import CacheLayout

TOKENS = LANES
"""Tokens that are multiplied at a time, one a lane; a block holds a multiple of it."""

TILE = 8
"""Most times `TOKENS` between two updates of a row's maximum."""

TILE_BYTES = TILE * VECTOR_BYTES
"""Bytes of a tile's numbers, float32, of one row."""

SPLIT_TOKENS = 1024
"""A context is cut at its multiples, whatever the batch and the number of threads: the bits of a
request's results depend on neither."""

BASE_BYTES = 16
"""Bytes that say where 16 tokens lie: int64, the address of their block and the first of them."""

STEPS = 32
"""Where the steps of a row's integers begin, behind the corrections of at most 8 value groups."""

PIECE_BYTES = TILE * TOKENS
"""Bytes of a tile's integers of one row: a plane of high bytes, and one of low bytes."""

ROW_FIELDS = 64
"""Bytes of a row behind its numbers: what `Row` names, or `Partial`."""


class Row:
    """Byte offsets behind a prepared query's numbers.

    The query's row is 4 P bytes, float32 or two planes of int8, and for each unit of dimensions the
    float32 sum of its numbers. Then: factor, extra: logit = factor * product + extra. first, stop:
    int32, the positions that the query sees.
    """

    FACTOR, EXTRA, FIRST, STOP, SOFTCAP = range(0, 20, 4)


class Partial:
    """Byte offsets behind the P float32 sums of a row over one split."""

    MAXIMUM, TOTAL = 0, 4


@dataclass(frozen=True)
class AttendVariant:
    """What a kernel is generated for.

    Attributes:
        layout: of the cache; values are rows.
        kind: dtype of queries and results.
        group: query heads of a KV head.
        rows: of queries of a KV head that registers serve at a time.
        integers: codes are multiplied as integers (AVX512-VNNI), by queries and probabilities in
            16 bits.
        scale: keys have one.
        shift: q . mu counts.
        softcap: logits are bounded.
        sinks: query heads have them.
    """

    layout: CacheLayout
    kind: Float
    group: int
    rows: int
    integers: bool = False
    scale: bool = False
    shift: bool = False
    softcap: bool = False
    sinks: bool = False

    @property
    def padded(self) -> int:
        """P."""
        return self.layout.padded_size

    @property
    def unit(self) -> int:
        """Neighbouring dimensions whose products are summed before scales multiply them."""
        return 32 if self.layout.half % 32 == 0 else 16

    @property
    def units(self) -> int:
        """Of a head."""
        return self.padded // self.unit

    @property
    def row_bytes(self) -> int:
        """Bytes of a prepared query: numbers, sums of units, fields."""
        return 4 * self.padded + 2 * ROW_FIELDS

    @property
    def partial_bytes(self) -> int:
        """Bytes of a row of a split's results."""
        return 4 * self.padded + ROW_FIELDS

    @property
    def sums_at(self) -> int:
        """Where a prepared query's sums begin."""
        return 4 * self.padded

    @property
    def fields_at(self) -> int:
        """Where a prepared query's fields begin."""
        return 4 * self.padded + ROW_FIELDS


@dataclass(frozen=True)
class Frame:
    """A task's memory on the stack, by byte offsets.

    A plane is `TILE_BYTES`.
    """

    variant: AttendVariant

    @property
    def bases(self) -> int:
        """`BASE_BYTES` for each 16 tokens of a split and of a tile behind it."""
        return 0

    @property
    def scales(self) -> int:
        """Per value group: a plane of scales, and one of zero-points."""
        return BASE_BYTES * (SPLIT_TOKENS // TOKENS + TILE)

    @property
    def logits(self) -> int:
        """Per row: a plane."""
        return self.scales + 2 * self.variant.layout.value_groups * TILE_BYTES

    @property
    def weights(self) -> int:
        """Per row, per value group: a plane of probabilities times scales."""
        return self.logits + self.variant.rows * TILE_BYTES

    @property
    def corrections(self) -> int:
        """Per row, `ROW_FIELDS`: each value group's sum of weights times zero-points, and step."""
        return self.weights + self.variant.rows * self.variant.layout.value_groups * TILE_BYTES

    @property
    def decay(self) -> int:
        """Per row, float32: what the sums before are multiplied by."""
        return self.corrections + self.variant.rows * ROW_FIELDS

    @property
    def numbers(self) -> int:
        """Per row, per value group: two planes of `PIECE_BYTES`, the weights as integers."""
        return self.decay + ROW_FIELDS

    @property
    def size(self) -> int:
        """Bytes of all."""
        return self.numbers + 2 * PIECE_BYTES * self.variant.rows * self.variant.layout.value_groups
