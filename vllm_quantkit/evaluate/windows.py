"""The tokens that models are compared on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from vllm_quantkit.errors import ConfigError

FEWEST_WINDOWS = 2
"""One window says nothing of how much another would differ."""


@dataclass(frozen=True)
class Windows:
    """Windows of text; each token but a window's first is predicted from those before it.

    Attributes:
        rows: token ids, a tuple for each window.
        source: where the text came from.
        warnings: what a reader should know of it, a sentence each.

    Raises:
        ConfigError: fewer than `FEWEST_WINDOWS`, or a window that predicts nothing.
    """

    rows: tuple[tuple[int, ...], ...]
    source: str
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.rows) < FEWEST_WINDOWS or min(map(len, self.rows)) < 2:
            raise ConfigError(
                f"{len(self.rows)} windows of {self.source} are too few to compare models on, "
                f"which takes at least {FEWEST_WINDOWS} of 2 tokens or more: raise --windows."
            )

    @property
    def length(self) -> int:
        """Tokens of the longest window."""
        return max(map(len, self.rows))

    @property
    def predicted(self) -> int:
        """Tokens that are predicted."""
        return sum(len(row) - 1 for row in self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens: the same for the same windows in the same order."""
        return hashlib.sha256(repr(self.rows).encode()).hexdigest()
