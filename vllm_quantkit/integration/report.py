"""What loading did, said once: kernels, layers left in 16 bits, tensors nobody consumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm.logger import init_logger

from vllm_quantkit.integration.loading import Ledger

# vLLM formats and levels only loggers below its own name.
logger = init_logger("vllm.quantkit")

NAMES_SHOWN = 8


@dataclass
class LoadReport:
    """Counts a model's layers while it loads and speaks when the last one is ready.

    Attributes:
        method: the name given to `--quantization`.
    """

    method: str
    _expected: set[str] = field(default_factory=set)
    _ready: dict[str, str] = field(default_factory=dict)
    _unquantized: list[str] = field(default_factory=list)
    _received: set[str] = field(default_factory=set)

    def expect(self, prefix: str) -> None:
        """A quantised layer was created."""
        self._expected.add(prefix)

    def leave_unquantized(self, prefix: str) -> None:
        """A linear layer stays in 16 bits."""
        self._unquantized.append(prefix)

    def received(self, partitions: Iterable[str], ledger: Ledger) -> None:
        """Checkpoint layers whose tensors arrived."""
        if ledger.received:
            self._received.update(partitions)

    def ready(self, prefix: str, kernel: str) -> None:
        """A layer is packed; after the last one the summary is logged."""
        self._ready[prefix] = kernel
        if self._expected == self._ready.keys():
            self._summarise()

    def _summarise(self) -> None:
        for kernel, count in Counter(self._ready.values()).most_common():
            logger.info("%s: %d layers run %s.", self.method, count, kernel)
        if self._unquantized:
            logger.warning(
                "%s: %d linear layers stay in 16 bits: %s.",
                self.method,
                len(self._unquantized),
                shorten(self._unquantized),
            )


def shorten(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    rest = len(names) - NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
