"""How much memory loading takes: sampled while tensors arrive, said once at the end."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
"""Where Linux tells a process its memory; elsewhere the host's share is not measured."""

MIB = 1 << 20


def host_bytes() -> int:
    """Memory of this process that no file backs; 0 where the system does not tell."""
    if not STATUS.exists():
        return 0
    lines = STATUS.read_text().splitlines()
    values = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return 1024 * int(values[0]) if values else 0


def release_freed() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    It would keep what the temporaries of every layer leave behind: on a model of 12 layers, twice
    the quantised model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@dataclass
class MemoryWatch:
    """Peak memory over a start, and what arrived.

    Attributes:
        largest: bytes of the largest 16-bit tensor.
        original: bytes of all 16-bit tensors that were quantised.
        quantised: bytes of what they became.
    """

    largest: int = 0
    original: int = 0
    quantised: int = 0
    _start: int = -1
    _peak: int = 0

    def begin(self) -> None:
        """Measure from here; only the first call counts."""
        if self._start < 0:
            self._start = self._peak = host_bytes()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    def sample(self) -> None:
        """Note the memory in use."""
        self._peak = max(self._peak, host_bytes())

    def arrived(self, original: int, quantised: int) -> None:
        """A tensor of so many bytes was quantised to so many."""
        self.largest = max(self.largest, original)
        self.original += original
        self.quantised += quantised
        self.sample()

    def describe(self) -> str:
        """Peak and sizes in a sentence."""
        self.sample()
        peak = f"host memory grew by at most {(self._peak - self._start) / MIB:.0f} MiB"
        if torch.cuda.is_available():
            peak += f", GPU memory peaked at {torch.cuda.max_memory_allocated() / MIB:.0f} MiB"
        return (
            f"{self.original / MIB:.0f} MiB of 16-bit weights became {self.quantised / MIB:.0f} "
            f"MiB; {peak}; the largest 16-bit tensor has {self.largest / MIB:.0f} MiB"
        )
