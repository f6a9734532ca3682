"""The canonical CUDA layout of weights: tiles of 128 rows x 128 columns, in MMA order.

A tensor-core A fragment gives thread t (lane % 4) of row n the columns 16 c + 8 j + 2 t + b for
b, j in {0, 1} and every c. A word holds such columns only, so that unpacking it fills the
registers of the thread that loaded it and no weight ever moves between threads:

    4 bits, word (t, v) of a row:                  8 bits, word (h, t, v) of a row:

      bits 0    4    8   12   16   20   24   28      bits 0         8        16        24
         +----+----+----+----+----+----+----+----+      +---------+---------+---------+---------+
      k  | +0 |+16 | +8 |+24 | +1 |+17 | +9 |+25 |      |   +0    |   +8    |   +1    |   +9    |
         +----+----+----+----+----+----+----+----+      +---------+---------+---------+---------+
      from 32 v + 2 t                                from 64 h + 16 v + 2 t

    2 bits, word (t, v) of a row, from column 64 v + 2 t:

      bits 0    2    4    6    8   10   12   14   16   18            30
         +----+----+----+----+----+----+----+----+----+----+--    +----+
      k  | +0 |+16 |+32 |+48 | +8 |+24 |+40 |+56 | +1 |+17 | ...  |+57 |
         +----+----+----+----+----+----+----+----+----+----+--    +----+

Where the compiler lets thread t have columns 16 c + 4 t + 2 j + b instead ("quads"), +8 becomes +2
in all words, and 2 t becomes 4 t.

One `(word >> s) & mask` therefore yields two neighbouring columns, one in each 16-bit half.
A group of 16 columns never splits a pair, nor a group of 16 a word of 8 bits, of 32 one of 4 bits,
of 64 one of 2 bits.

Tiles are contiguous and follow each other along k, so a program reads its weights in order.
Scale and zero-point share a word: see `pack_scales`.
"""

import torch
from torch import Tensor

from quantkit_kernels.packing import pack_aligned, unpack_aligned

TILE_N = 128
"""Rows of a tile. Kernels may take half a tile; rows are padded to whole ones."""

TILE_K = 128
"""Columns of a tile."""

_J, _T = 2, 3
"""Axes of columns that change places in quads."""

# (v, c, j, t, b) at 2 and 4 bits and (h, v, j, t, b) at 8: how 128 columns split, slowest first.
_COLUMN_AXES = {2: (2, 4, 2, 4, 2), 4: (4, 2, 2, 4, 2), 8: (2, 4, 2, 4, 2)}
# Those axes in storage order: first the word's, then the position in the word, highest bits first.
_STORAGE_ORDER = {2: (_T, 0, 4, _J, 1), 4: (_T, 0, 4, _J, 1), 8: (0, _T, 1, 4, _J)}


def _axes(bits: int, quads: bool) -> tuple[list[int], list[int]]:
    """Sizes of the axes of 128 columns, and those axes in storage order."""
    sizes, order = list(_COLUMN_AXES[bits]), list(_STORAGE_ORDER[bits])
    if quads:
        sizes[_J], sizes[_T] = sizes[_T], sizes[_J]
        order = [{_J: _T, _T: _J}.get(axis, axis) for axis in order]
    return sizes, order


def padded_rows(out_features: int) -> int:
    """N' = ceil(N / 128) * 128."""
    return -(-out_features // TILE_N) * TILE_N


def padded_columns(columns: int) -> int:
    """K'' = ceil(K' / 128) * 128."""
    return -(-columns // TILE_K) * TILE_K


def pack_codes(codes: Tensor, bits: int, *, quads: bool = False) -> Tensor:
    """words[i, j, r, w] = the codes of row 128 i + r at the columns of word w of k tile j.

    Args:
        codes: uint8 [N, K'], each below 2**bits. Padding rows and columns get code 0.
        bits: 2, 4 or 8.
        quads: threads have four neighbouring columns.

    Returns:
        int32 [N' / 128, K'' / 128, 128, 4 * bits].
    """
    rows, columns = codes.shape
    padding = (0, padded_columns(columns) - columns, 0, padded_rows(rows) - rows)
    padded = torch.nn.functional.pad(codes, padding)
    sizes, order = _axes(bits, quads)
    split = padded.unflatten(0, (-1, TILE_N)).unflatten(2, (-1, *sizes))
    ordered = split.permute(0, 2, 1, *(3 + axis for axis in order))
    return pack_aligned(ordered.flatten(3), bits).contiguous()


def unpack_codes(words: Tensor, bits: int, *, quads: bool = False) -> Tensor:
    """Inverse of `pack_codes`: uint8 [N', K''], padding included."""
    sizes, order = _axes(bits, quads)
    stored = unpack_aligned(words, bits, TILE_K).unflatten(3, [sizes[axis] for axis in order])
    inverse = [order.index(axis) for axis in range(len(order))]
    split = stored.permute(0, 2, 1, *(3 + axis for axis in inverse))
    codes: Tensor = split.flatten(2).flatten(0, 1)
    return codes


def pack_scales(scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """word = fp32 scale rounded to 16 significant bits, its low byte replaced by the zero-point.

    Every float16 and bfloat16 scale is exact, at any exponent. One instruction each yields the
    scale in fp32 (mask), the scale as a rounded 16-bit pair (convert) and the zero-point as an
    exact 16-bit pair (byte permute). A 32-bit word can be loaded asynchronously, 16 bits cannot.

    Args:
        scales: float32 [N, K' / g], or [N, 1] of rows with one scale each.
        zeros: uint8, shaped as `scales`, or None: a word is all scale, exactly.
        group_size: g, which divides 128, or K'' of whole rows.

    Returns:
        int32 [K'' / g, N']; padding has scale 0.
    """
    words = scales.float().contiguous().view(torch.int32)
    if zeros is not None:
        rounded = (words + 0x7F + ((words >> 8) & 1)) & ~0xFF
        words = rounded | zeros.to(torch.int32)
    rows, groups = words.shape
    missing = padded_columns(groups * group_size) // group_size - groups
    padding = (0, missing, 0, padded_rows(rows) - rows)
    return torch.nn.functional.pad(words, padding).T.contiguous()


def unpack_scales(words: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_scales` with zeros: float32 and uint8, both [N', K'' / g]."""
    by_row = words.T.contiguous()
    return (by_row & ~0xFF).view(torch.float32), (by_row & 0xFF).to(torch.uint8)
