"""Time to spend."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Seconds to spend, from the moment it was made.

    Attributes:
        seconds: all together.
        clock: in seconds.
        start: what the clock showed.
    """

    seconds: float
    clock: Callable[[], float]
    start: float

    @classmethod
    def begin(cls, seconds: float, clock: Callable[[], float] = time.monotonic) -> Budget:
        """Start the clock."""
        return cls(seconds, clock, clock())

    @property
    def left(self) -> float:
        """Seconds, negative where it is overdrawn."""
        return self.seconds - (self.clock() - self.start)
