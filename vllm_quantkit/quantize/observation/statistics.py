"""What calibration notes of a layer's inputs: moments, ranges and a few of the inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_quantkit.errors import QuantkitError

BLOCK = 512
"""Channels in a block of second moments; those below the diagonal are never computed."""

SAMPLE_ROWS = 512
"""Inputs kept as they are, spread over the calibration set: searches measure errors on them."""


@dataclass(frozen=True)
class Ranges:
    """Per input channel, over a set of tokens.

    Attributes:
        mean_abs: float32 [K], mean of |x|.
        low: float32 [K], the least x.
        high: float32 [K], the largest x.
        tokens: inputs seen.
    """

    mean_abs: Tensor
    low: Tensor
    high: Tensor
    tokens: int

    @property
    def absmax(self) -> Tensor:
        """float32 [K], the largest |x|."""
        return torch.maximum(self.high, -self.low)


@dataclass(frozen=True)
class InputStats:
    """A layer's inputs x over the calibration tokens.

    Attributes:
        ranges: over all of them.
        halves: over the two halves of the calibration set; one may have seen no token.
        hessian: float32 [K, K], mean of x x^T; None where no method asked for it.
        sample: float32 [S, K], at most `SAMPLE_ROWS` of the inputs; S = 0 where none was kept.
    """

    ranges: Ranges
    halves: tuple[Ranges, Ranges]
    hessian: Tensor | None
    sample: Tensor


class InputMoments:
    """Running statistics of a layer's inputs.

    Args:
        in_features: K.
        hessian: True also sums x x^T.
        expected_rows: inputs that will come, about: the sample is spread evenly over them.
        device: where the sums are kept.
    """

    def __init__(
        self,
        in_features: int,
        *,
        hessian: bool,
        expected_rows: int,
        device: torch.device | None = None,
    ) -> None:
        zeros = torch.zeros(in_features, device=device)
        self._sums = [zeros.clone(), zeros.clone()]
        self._lows = [torch.full_like(zeros, torch.inf) for _ in range(2)]
        self._highs = [torch.full_like(zeros, -torch.inf) for _ in range(2)]
        self._tokens = [0, 0]
        self._outer = zeros.new_zeros(in_features, in_features) if hessian else None
        self._stride = max(1, expected_rows // SAMPLE_ROWS)
        self._kept: list[Tensor] = []
        self._room = SAMPLE_ROWS

    @property
    def tokens(self) -> int:
        """Inputs seen."""
        return sum(self._tokens)

    def add(self, x: Tensor, half: int) -> None:
        """Notes inputs x, float [..., K], of the first (0) or second (1) half of the set."""
        rows = x.detach().flatten(0, -2).float()
        if not len(rows):
            return
        self._sums[half] += rows.abs().sum(0)
        self._lows[half] = torch.minimum(self._lows[half], rows.amin(0))
        self._highs[half] = torch.maximum(self._highs[half], rows.amax(0))
        self._keep(rows)
        self._tokens[half] += len(rows)
        if self._outer is not None:
            for start in range(0, rows.shape[1], BLOCK):
                block = rows[:, start : start + BLOCK]
                self._outer[start : start + BLOCK, start:].addmm_(block.T, rows[:, start:])

    def stats(self) -> InputStats:
        """What was seen so far.

        Raises:
            QuantkitError: nothing was.
        """
        if not self.tokens:
            raise QuantkitError("the layer saw no calibration token.")
        first, second = (self._ranges(half) for half in range(2))
        return InputStats(
            ranges=Ranges(
                mean_abs=(self._sums[0] + self._sums[1]) / self.tokens,
                low=torch.minimum(first.low, second.low),
                high=torch.maximum(first.high, second.high),
                tokens=self.tokens,
            ),
            halves=(first, second),
            hessian=None if self._outer is None else _mirrored(self._outer) / self.tokens,
            sample=torch.cat(self._kept),
        )

    def _keep(self, rows: Tensor) -> None:
        """Every `stride`-th of all inputs seen, while there is room."""
        first = -self.tokens % self._stride
        chosen = rows[first :: self._stride][: self._room]
        self._kept.append(chosen.clone())
        self._room -= len(chosen)

    def _ranges(self, half: int) -> Ranges:
        tokens = self._tokens[half]
        mean = self._sums[half] / max(tokens, 1)
        return Ranges(mean, self._lows[half], self._highs[half], tokens)


def _mirrored(outer: Tensor) -> Tensor:
    """The symmetric [K, K] with this upper triangle."""
    upper = outer.triu()
    return upper + upper.triu(1).T
