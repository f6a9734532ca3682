"""Seconds of a step: bytes over bandwidth or operations over peak, whichever is longer, plus fixed
costs (the roofline model, https://doi.org/10.1145/1498765.1498785).

A decode step reads every weight once and every cached key and value of the batch; it multiplies
each weight by a row for each sequence. A prefill multiplies each weight by a row for each token of
the prompt, and attends to what came before.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, Protocol

from vllm_quantkit.advise.candidates import Scheme
from vllm_quantkit.hardware import Device, Number
from vllm_quantkit.spec import Frozen

Limit = Literal["memory bandwidth", "arithmetic", "fixed costs"]
"""What most of a step's time goes to."""

MEMORY_EFFICIENCY = 0.8
COMPUTE_EFFICIENCY = 0.6
"""Shares of a data sheet's figures that kernels reach: assumed, and replaced where a device is
measured."""

STEP_SECONDS = {"cuda": 0.5e-3, "cpu": 1e-3, "apple": 1e-3}
LAYER_SECONDS = {"cuda": 25e-6, "cpu": 100e-6, "apple": 25e-6}
"""Fixed costs of a step, and of each decoder layer in it: assumed."""

LINK_SECONDS = 15e-6
"""One all-reduce of a step's activations between tensor-parallel ranks; two in each layer.
Assumed, for GPUs with fast links."""

CHUNK = 2048
"""Tokens of a prompt that run through the model at a time, for one reading of the weights."""


class Rates(Frozen):
    """What kernels reach on a device.

    Attributes:
        bandwidth: bytes a second.
        peaks: multiplications and additions a second, by number.
        step_seconds, layer_seconds: fixed costs of a step and of a layer.
        measured: `bandwidth` and numbers that were measured on this machine.
    """

    bandwidth: float
    peaks: dict[Number, float]
    step_seconds: float = 0.0
    layer_seconds: float = 0.0
    measured: tuple[str, ...] = ()

    def peak(self, number: Number) -> float:
        """Of products of that number, else of 16-bit floats; infinite where neither is known."""
        return self.peaks.get(number) or self.peaks.get("bf16") or inf


def rates_of(device: Device) -> Rates:
    """Published figures times what kernels usually reach of them; measured ones as they are."""
    memory = 1.0 if "bandwidth" in device.measured else MEMORY_EFFICIENCY
    return Rates(
        bandwidth=device.bandwidth * memory,
        peaks={
            number: peak * (1.0 if number in device.measured else COMPUTE_EFFICIENCY)
            for number, peak in device.peaks.items()
        },
        step_seconds=STEP_SECONDS[device.kind],
        layer_seconds=LAYER_SECONDS[device.kind],
        measured=device.measured,
    )


@dataclass(frozen=True)
class Work:
    """What one rank reads and multiplies for a token.

    Attributes:
        weights: of the blocks' linear layers that a token runs through.
        weight_bytes: of those layers.
        head_weights: of the output head, in 16 bits.
        cache_bytes: of a token's keys and values over all layers.
        layers: decoder layers.
        attention: heads * head_dim * layers of this rank.
        tp: tensor-parallel size.
    """

    weights: int
    weight_bytes: int
    head_weights: int
    cache_bytes: int
    layers: int
    attention: int
    tp: int = 1


class LinearClock(Protocol):
    """How long the linear layers of a step take."""

    def seconds(self, scheme: Scheme, weights: int, nbytes: int, rows: int) -> float:
        """Of layers with so many weights and bytes, for so many rows."""


@dataclass(frozen=True)
class RooflineClock:
    """The longer of reading the weights and multiplying them."""

    rates: Rates

    def seconds(self, scheme: Scheme, weights: int, nbytes: int, rows: int) -> float:
        """max(bytes / bandwidth, 2 rows weights / peak)."""
        operations = 2 * rows * weights
        return max(nbytes / self.rates.bandwidth, operations / self.rates.peak(scheme.number))


@dataclass(frozen=True)
class Step:
    """Seconds of a decode step, by what they go to.

    Attributes:
        linear: linear layers.
        cache: reading keys and values.
        fixed: launches, scheduling, and exchanges between ranks.
        by_arithmetic: True where the linear layers take longer than reading their weights.
    """

    linear: float
    cache: float
    fixed: float
    by_arithmetic: bool

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.linear + self.cache + self.fixed

    @property
    def limit(self) -> Limit:
        """What the largest part goes to."""
        arithmetic = self.linear if self.by_arithmetic else 0.0
        memory = self.cache + self.linear - arithmetic
        if self.fixed >= max(arithmetic, memory):
            return "fixed costs"
        return "arithmetic" if arithmetic >= memory else "memory bandwidth"


def decode_step(
    work: Work, scheme: Scheme, clock: LinearClock, rates: Rates, *, rows: int, context: int
) -> Step:
    """One token more for `rows` sequences of `context` tokens."""
    linear = clock.seconds(scheme, work.weights, work.weight_bytes, rows)
    read = work.weight_bytes / rates.bandwidth
    return Step(
        linear=linear + _head(work, clock, rows),
        cache=rows * context * work.cache_bytes / rates.bandwidth,
        fixed=_fixed(work, rates),
        by_arithmetic=linear > 1.01 * read,
    )


def prefill_seconds(
    work: Work, scheme: Scheme, clock: LinearClock, rates: Rates, tokens: int
) -> float:
    """From a prompt of so many tokens to the first token of the answer."""
    whole, rest = divmod(tokens, CHUNK)
    chunks = [(CHUNK, whole), (rest, 1 if rest else 0)]
    linear = sum(
        times * clock.seconds(scheme, work.weights, work.weight_bytes, rows)
        for rows, times in chunks
        if times
    )
    steps = sum(times for _, times in chunks)
    # Queries times keys and weights times values, of which a causal mask leaves half.
    attention = 2 * work.attention * tokens**2 / rates.peak("bf16")
    return linear + attention + _head(work, clock, 1) + steps * _fixed(work, rates)


def _head(work: Work, clock: LinearClock, rows: int) -> float:
    """The output head, which stays in 16 bits."""
    return clock.seconds(SIXTEEN_BIT, work.head_weights, 2 * work.head_weights, rows)


def _fixed(work: Work, rates: Rates) -> float:
    links = 2 * LINK_SECONDS * work.layers if work.tp > 1 else 0.0
    return rates.step_seconds + rates.layer_seconds * work.layers + links


SIXTEEN_BIT = Scheme(name="16-bit", words="16-bit weights")
