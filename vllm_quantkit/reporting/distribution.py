"""How figures of single tokens are spread, in a few numbers that a picture can be drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_quantkit.evaluate.window_scores import WindowScores
from vllm_quantkit.spec import Frozen

SHARES = (
    *(0.0, 0.01, 0.02),
    *(place / 20 for place in range(1, 20)),
    *(0.98, 0.99, 0.995, 0.999, 1.0),
)  # fmt: skip
"""Of the tokens: evenly spaced, and closer where few tokens carry much of a mean."""


class Distribution(Frozen):
    """Quantiles over all tokens of a text: `share` of them have at most this value.

    Attributes:
        shares: of tokens, rising from 0 to 1.
        divergences: KL(base || model), nats; empty where there was no base.
        losses: -ln q of the token that follows, nats.
        base_losses: the base's; empty where there was none.
    """

    shares: tuple[float, ...]
    divergences: tuple[float, ...] = ()
    losses: tuple[float, ...]
    base_losses: tuple[float, ...] = ()

    @classmethod
    def of(cls, scores: Sequence[WindowScores]) -> Distribution:
        """The distribution over every token of every window."""
        return cls(
            shares=SHARES,
            losses=_quantiles([window.losses for window in scores]),
            base_losses=_quantiles([window.base_losses for window in scores]),
            divergences=_quantiles([window.divergences for window in scores]),
        )


def _quantiles(parts: Sequence[NDArray[np.float64] | None]) -> tuple[float, ...]:
    """At `SHARES`; none where a window has no figures."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return ()
    return tuple(np.quantile(np.concatenate(known), SHARES).tolist())
