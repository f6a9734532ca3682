"""What can be measured, with its unit and which way is faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_quantkit.bench.samples import Better


class Key(NamedTuple):
    """One measured quantity: its name in `QUANTITIES`, and the batch, length or rate it is at."""

    quantity: str
    at: float


@dataclass(frozen=True)
class Quantity:
    """How a measured quantity is told.

    Attributes:
        title: with a place for what it is measured at, or without.
        unit: of the values.
        better: which way is faster.
        shown: unit in tables.
        scale: value in tables over value.
    """

    title: str
    unit: str
    better: Better
    shown: str
    scale: float = 1.0


def _rate(title: str, unit: str = "tokens/s") -> Quantity:
    return Quantity(title, unit, "higher", unit)


def _time(title: str) -> Quantity:
    return Quantity(title, "s", "lower", "ms", 1000.0)


QUANTITIES = {
    "decode": _rate("decode, batch of {}"),
    "prefill": _rate("prefill, {} tokens"),
    "mixed": _rate("mixed batch of {}"),
    "first": _time("first token, prompt of {}"),
    "first_loaded": _time("first token under load, prompt of {}"),
    "gap": _time("between two tokens, batch of {}, median"),
    "gap_tail": _time("between two tokens, batch of {}, p99"),
    "output": _rate("output, {} requests/s"),
    "total": _rate("prompts and output, {} requests/s"),
    "requests": _rate("finished, {} requests/s", "requests/s"),
    "ttft": _time("TTFT, {} requests/s, median"),
    "ttft_tail": _time("TTFT, {} requests/s, p99"),
    "tpot": _time("TPOT, {} requests/s, median"),
    "tpot_tail": _time("TPOT, {} requests/s, p99"),
    "itl": _time("ITL, {} requests/s, median"),
    "itl_tail": _time("ITL, {} requests/s, p99"),
}
"""Name to quantity, in the order in which they are shown; those from `output` on are a server's.

TTFT is the time to first token, TPOT the time per output token after it, ITL the inter-token
latency, as `vllm bench serve` has them.
"""

TAILS = frozenset(name for name in QUANTITIES if name.endswith("_tail"))
"""Quantities that single outliers decide."""


def title(key: Key) -> str:
    """In words, with the unit in tables."""
    quantity = QUANTITIES[key.quantity]
    at = str(int(key.at)) if key.at % 1 == 0 else f"{key.at:g}"
    return f"{quantity.title.format(at)}, {quantity.shown}".replace("inf requests/s", "all at once")


def shown(key: Key, value: float) -> str:
    """A value as tables have it: four digits, never an exponent."""
    scaled = value * QUANTITIES[key.quantity].scale
    return (
        f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.1f}" if scaled >= 10 else f"{scaled:.2f}"
    )
