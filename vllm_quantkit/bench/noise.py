"""How still the machine was: fixed work, timed again and again between the measurements."""

from __future__ import annotations

import os
import time
from statistics import fmean, median, stdev

from pydantic import computed_field

from vllm_quantkit.spec import Frozen

MOST_VARIATION = 0.05
"""Coefficient of variation of fixed work beyond which a machine is called noisy."""

MOST_DRIFT = 0.05
"""Relative change from the first third of the run to the last."""

MOST_LOAD = 0.25
"""Of the cores: busy with other programs before the start."""

PRODUCT_SIZE = 512
"""Rows and columns of the matrices whose product is the fixed work of this process."""


class Noise(Frozen):
    """How still the machine was while speeds were measured.

    Attributes:
        seconds: of the same fixed work, in the order of time.
        load: mean number of programs that wanted a core in the minute before the start
            (`os.getloadavg`); None where it was not asked or the system does not tell.
        cores: of the machine.
    """

    seconds: tuple[float, ...] = ()
    load: float | None = None
    cores: int = os.cpu_count() or 1

    @computed_field  # type: ignore[prop-decorator]
    @property
    def variation(self) -> float:
        """Coefficient of variation: standard deviation over mean."""
        return stdev(self.seconds) / fmean(self.seconds) if len(self.seconds) > 1 else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def drift(self) -> float:
        """Median of the last third of the times over that of the first, less 1."""
        third = max(len(self.seconds) // 3, 1)
        if len(self.seconds) < 2:
            return 0.0
        return median(self.seconds[-third:]) / median(self.seconds[:third]) - 1

    def warnings(self) -> tuple[str, ...]:
        """What was not as it should be, a sentence each."""
        found = []
        if self.variation > MOST_VARIATION:
            found.append(
                f"the same work took times that vary by {self.variation:.0%}, more than "
                f"{MOST_VARIATION:.0%}: something else runs here, or the clock rate changes."
            )
        if abs(self.drift) > MOST_DRIFT:
            slower = "slower" if self.drift > 0 else "faster"
            found.append(
                f"the machine became {abs(self.drift):.0%} {slower} from the first third of the "
                "run to the last: it heats up, or another program came or went."
            )
        if self.load is not None and self.load > MOST_LOAD * self.cores:
            found.append(
                f"other programs kept {self.load:.1f} of {self.cores} cores busy before the start: "
                "stop them, or wait."
            )
        return tuple(found)


def load_average() -> float | None:
    """Of the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def fixed_work() -> float:
    """Seconds of fixed work in this process, about a hundredth of one."""
    import numpy as np

    matrix = np.full((PRODUCT_SIZE, PRODUCT_SIZE), 0.5, dtype=np.float32)
    begin = time.perf_counter()
    for _ in range(8):
        matrix @ matrix
    return time.perf_counter() - begin
