"""What number a weight code stands for: integers, 8-bit floats, and 4-bit code books."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

CodeType = Literal["int", "e4m3", "e5m2", "nf4", "fp4"]
"""`int`: an unsigned integer from which a zero-point is subtracted. `e4m3` and `e5m2`: the bits of
an 8-bit float (arXiv 2209.05433; E4M3 without infinities, the variant called FN). `nf4`: the
quantiles of a normal distribution (arXiv 2305.14314). `fp4`: bitsandbytes' 4-bit float."""

FLOAT8_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
"""Code type to the dtype whose bits its codes are."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_POSITIVE = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4 = (*_FP4_POSITIVE, *(-value for value in _FP4_POSITIVE))
CODE_BOOKS = {"nf4": NF4, "fp4": FP4}
"""Code type to its 16 values."""


@lru_cache(maxsize=8)
def code_values(code_type: CodeType) -> Tensor:
    """float32 [256] or [16]: the number each code stands for; not for `int`.

    Raises:
        KeyError: `int`, whose numbers depend on the zero-point.
    """
    if code_type in FLOAT8_DTYPES:
        return torch.arange(256, dtype=torch.uint8).view(FLOAT8_DTYPES[code_type]).float()
    return torch.tensor(CODE_BOOKS[code_type], dtype=torch.float32)
