"""What every implementation in the comparison looks like, ours and others'."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.gpu.problems import Kind, Op


class Layer(ABC):
    """A layer that holds its tensors, so that a deep copy of it reads other memory."""

    def prepare(self, x: Tensor) -> Any:
        """What is made of bfloat16 x [M, K] before the clock runs; x itself."""
        return x

    def seen(self, inputs: Any) -> Tensor:
        """float32 [M, K]: the activations that prepared inputs stand for."""
        values: Tensor = inputs.float()
        return values

    @abstractmethod
    def __call__(self, inputs: Any) -> Any:
        """The call that is timed."""

    def value(self, result: Any) -> Tensor:
        """float32: the numbers that a result stands for."""
        values: Tensor = result.float()
        return values


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: for tables; begins with whose it is.
        kind: of its weights or results.
        make: a layer from a `QuantizedWeight`, or from the channels K of an operation.
        max_error: norm of the error over that of the result; its reason stands beside it.
        op: what it computes.
        outliers: True where 1 % of the channels of x are large.
        graph: False where it waits for the GPU, which a CUDA graph cannot hold.
    """

    name: str
    kind: Kind
    make: Callable[[Any], Layer]
    max_error: float
    op: Op = "linear"
    outliers: bool = False
    graph: bool = True


EXACT = 2.5e-3
"""y rounded to bfloat16, 1.7e-3 on average, more where few elements are large."""

ROUNDED_WEIGHTS = 4e-3
"""The same with scaled weights rounded to bfloat16, 2.4e-3 in all, as large tiles round them."""

ROUNDED = 6e-3
"""The same with scales rounded to bfloat16, too, and sums of splits in it."""

HALF_SUMS = 2e-2
"""Sums in float16, over thousands of products."""

SHORT_SUMS = 2e-2
"""Hopper adds FP8 products in 14 bits, rounded towards zero, where a kernel does not promote."""

E4M3_ROWS = 5e-2
"""Rows rounded to E4M3's 4 significant bits, 2.7e-2 on average, and short sums."""

INT8_ROWS = 1.5e-2
"""Rows rounded to a 127th of their largest, which is 4 to 5 standard deviations: 1e-2."""

INT8_SILU_ROWS = 5e-2
"""The same where the largest is 15 to 20 standard deviations, as products of two normals are."""
