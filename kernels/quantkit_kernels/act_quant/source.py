"""What rows are made of, in the form that every device's module takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from quantkit_kernels.act_quant.rows import PER_TENSOR, PER_TOKEN, RowQuantizer, split_rows

Kind = Literal["x", "norm", "add_norm", "silu_mul"]
"""What is quantised: x, its norm, the norm of x + residual, or silu(gate) * up."""


class Source(NamedTuple):
    """Activations, and what is done to them before they are quantised.

    Attributes:
        kind: see above.
        x: [M, K], or [M, 2 K] for `silu_mul`; its rows are contiguous.
        width: K.
        weight: [K], the norm's; contiguous, of any dtype of activations.
        epsilon: the norm's.
        residual: [M, K], added to x; its rows are contiguous.
        total: [M, K], contiguous, where x + residual is written.
    """

    kind: Kind
    x: Tensor
    width: int
    weight: Tensor | None = None
    epsilon: float = 0.0
    residual: Tensor | None = None
    total: Tensor | None = None


Run = Callable[[Source, RowQuantizer, Tensor | None, Tensor | None], Tensor]
"""Makes rows with the given scale and zero-point, or with one scale per token or group."""


def quantise_with(
    run: Run, source: Source, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> Tensor:
    """`run`, twice where one dynamic scale serves all rows.

    The largest scale of any token is the one that the largest value of all asks for.
    """
    if scale is None and quantizer.group_size == PER_TENSOR:
        tokens = RowQuantizer(quantizer.code, PER_TOKEN, True, quantizer.upper_bound)
        rows = run(source, tokens, None, None)
        scale = split_rows(rows, tokens, source.width).scales.amax().reshape(1)
    return run(source, quantizer, scale, zero)
