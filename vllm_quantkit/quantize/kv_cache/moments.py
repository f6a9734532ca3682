"""What calibration keeps of a layer's queries, keys and values, and what it makes of that.

    mu = mean k        lambda = sqrt(RMS(k - mu) / RMS(q)) / its geometric mean over the head

per KV head and channel, RMS(q) over the query heads that read the KV head. The rotation spreads the
rounding error of (k - mu) / lambda evenly over its channels, so the mean square of what reaches a
logit grows with sum (k / lambda)^2 * sum (lambda q)^2. By Cauchy and Schwarz that is at least
(sum |k| |q|)^2, and is it where lambda^2 = |k| / |q|.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import KeyTreatment
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.kv_calibration import KeyChoice
from vllm_quantkit.quantize.kv_cache.formats import LARGEST_E4M3

QUIETEST = 1e-3
"""Of a head's RMS, of keys and of queries: a channel that moves less counts as moving so much, so
each moves lambda by a factor of 32 at most below the head's own, and a dead channel does not make
it 0 or infinite."""

QUANTILE = 0.95
"""Of the channels' disagreements: the few that hardly move always differ."""

UNSTABLE = 0.25
"""Beyond it two halves of the calibration set disagree: their means are a quarter of the keys'
spread apart, or their lambdas 28 %. Groups of 4 bits reach about 2.5 spreads either way, so that a
shift off by a quarter costs a tenth of their precision."""

CHOICES: tuple[KeyChoice, ...] = ("none", "shift", "shift+scale")
"""By what they ask of a cache."""

BOTH = [0, 1]
"""Halves of the calibration set, or of positions."""


class KeyMoments:
    """Sums over a layer's queries, keys and values, in float64, by halves of the set.

    Those of keys are also by halves of positions.

    Args:
        kv_heads: of keys.
        head_size: of a key and of a value.
        device: where sums are kept.
    """

    def __init__(self, kv_heads: int, head_size: int, device: torch.device) -> None:
        self._counts = torch.zeros(2, 2, dtype=torch.int64)  # [half, positions]
        shape = (2, 2, kv_heads, head_size)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._sums)
        self._queries = torch.zeros_like(self._sums[:, 0])  # squares, mean over a KV head's queries
        self._largest = torch.zeros(2, dtype=torch.float64, device=device)  # of keys, of values

    @property
    def kv_heads(self) -> int:
        """Of keys."""
        return self._sums.shape[2]

    @property
    def head_size(self) -> int:
        """Of a key."""
        return self._sums.shape[3]

    def add(self, query: Tensor, key: Tensor, value: Tensor, half: int) -> None:
        """Adds what attention gets, of tokens that are no padding.

        Args:
            query: float [B, heads, T, D], after RoPE; heads is a multiple of kv_heads.
            key: float [B, kv_heads, T, D], after RoPE.
            value: float [B, kv_heads, T, D].
            half: of the calibration set.
        """
        middle = key.shape[2] // 2
        for part, rows in enumerate((key[:, :, :middle], key[:, :, middle:])):
            exact = rows.double()
            self._counts[half, part] += rows.shape[0] * rows.shape[2]
            self._sums[half, part] += exact.sum((0, 2))
            self._squares[half, part] += exact.square().sum((0, 2))
        squares = query.double().square().sum((0, 2))
        self._queries[half] += squares.unflatten(0, (self.kv_heads, -1)).mean(1)
        here = torch.stack([key.abs().amax().double(), value.abs().amax().double()])
        self._largest = torch.maximum(self._largest, here)

    def check(self, layer: str) -> None:
        """Refuses sums of queries, keys or values that were not finite.

        Raises:
            QuantkitError: names the layer.
        """
        sums = (self._sums, self._queries, self._largest)
        if not all(bool(torch.isfinite(sum_).all()) for sum_ in sums):
            raise QuantkitError(
                f"{layer}: queries, keys or values are not finite on calibration text. Calibrate "
                "in float32 (--precision float32); where that does not help, the model's weights "
                "are damaged."
            )

    def mean(self, halves: list[int] = BOTH, parts: list[int] = BOTH) -> Tensor:
        """mu, float64 [kv_heads, head_size], of parts of the set."""
        return self._sums[halves][:, parts].sum((0, 1)) / self._count(halves, parts)

    def spread(self, halves: list[int] = BOTH) -> Tensor:
        """RMS(k - mu), float64 [kv_heads, head_size]; no channel is below `QUIETEST` of its head.

        It is 1 for a head whose keys are all alike.
        """
        power = self._squares[halves].sum((0, 1)) / self._count(halves, BOTH)
        return _bounded((power - self.mean(halves).square()).clamp_min(0).sqrt())

    def query_size(self, halves: list[int] = BOTH) -> Tensor:
        """RMS(q), float64 [kv_heads, head_size]; bounded like `spread`."""
        return _bounded((self._queries[halves].sum(0) / self._count(halves, BOTH)).sqrt())

    def treatment(self, choice: KeyChoice, halves: list[int] = BOTH) -> KeyTreatment:
        """What is done to keys before they are rounded: mu and lambda, float32."""
        if choice == "none":
            return KeyTreatment()
        shift = self.mean(halves).float()
        return KeyTreatment(shift, self._scale(halves).float() if choice == "shift+scale" else None)

    @property
    def fp8_scales(self) -> tuple[float, float]:
        """max|k| / 448 and max|v| / 448; 1 where all are 0. E4M3 holds x / scale."""
        scales = (self._largest / LARGEST_E4M3).float().tolist()
        return scales[0] or 1.0, scales[1] or 1.0

    def disagreement(self, choice: KeyChoice) -> float:
        """How far the treatments are apart that the halves of the calibration set give.

        The larger of q95 |mu_1 - mu_2| / RMS and q95 |ln(lambda_1 / lambda_2)|, over all channels;
        0 without a treatment. A half that saw no token disagrees infinitely: 1 stands for that.
        """
        if choice == "none":
            return 0.0
        if not bool(self._counts.sum(1).all()):
            return 1.0
        found = [_quantile((self.mean([0]) - self.mean([1])).abs() / self.spread())]
        if choice == "shift+scale":
            found.append(_quantile((self._scale([0]) / self._scale([1])).log().abs()))
        return max(found)

    def drift(self) -> float:
        """max |mu of early positions - mu of late ones| / RMS, over all channels."""
        if not bool(self._counts.sum(0).all()):
            return 0.0
        moved = self.mean(parts=[0]) - self.mean(parts=[1])
        return float((moved.abs() / self.spread()).max())

    def _scale(self, halves: list[int]) -> Tensor:
        """lambda, float64."""
        logarithm = (self.spread(halves) / self.query_size(halves)).log() / 2
        return (logarithm - logarithm.mean(-1, keepdim=True)).exp()

    def _count(self, halves: list[int], parts: list[int]) -> int:
        return max(1, int(self._counts[halves][:, parts].sum()))


def _bounded(rms: Tensor) -> Tensor:
    """Of channels [heads, D]: at least `QUIETEST` of their head's, and 1 in a head of zeros."""
    head = rms.square().mean(-1, keepdim=True).sqrt()
    return torch.where(head > 0, rms.maximum(QUIETEST * head), torch.ones_like(rms))


def _quantile(values: Tensor) -> float:
    ordered = values.flatten().sort().values
    return float(ordered[math.ceil(QUANTILE * (len(ordered) - 1))])
