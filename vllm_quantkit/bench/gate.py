"""Correctness first: an engine that computes something else has no speed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from vllm_quantkit.bench.measures import Asked
from vllm_quantkit.errors import ConfigError, QuantkitError
from vllm_quantkit.spec import Frozen

TOKENS = 1024
"""Of the text, at most: a second of work, and enough to tell a worse model from a broken one."""

DEFAULT_TOLERANCE = 0.5
"""Relative difference from the baseline's perplexity: 4 bits cost a small model 5 % or so, and a
kernel that is wrong multiplies it. A random model's is the same whatever its weights become."""


class Gate(Frozen):
    """Which perplexities are near enough to the baseline's.

    Attributes:
        text: that all engines read.
        tolerance: relative difference that is allowed.
    """

    text: str
    tolerance: float = DEFAULT_TOLERANCE

    def measure(self, engine: Asked) -> float:
        """Perplexity of the text; infinite where it overflows.

        Raises:
            EngineError: the engine failed.
        """
        answer = engine.ask("perplexity", text=self.text, max_tokens=TOKENS)
        return float(answer["perplexity"])

    def check(self, perplexity: float, base: float) -> None:
        """Nothing where both are alike.

        Raises:
            GateError: they are not, or the perplexity is no number.
        """
        if math.isfinite(perplexity) and abs(perplexity / base - 1) <= self.tolerance:
            return
        raise GateError(
            f"its perplexity is {perplexity:.4g}, the baseline's {base:.4g}, and a difference of "
            f"{self.tolerance:.0%} is allowed: it computes something else, so its speed means "
            "nothing. Raise --gate if such a loss is expected."
        )


class GateError(QuantkitError):
    """An engine's output is too far from the baseline's."""


def gate_text(file: Path | None) -> str:
    """The text of `file`, or the one that comes with the package.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    if file is None:
        return files("vllm_quantkit.bench").joinpath("gate.txt").read_text(encoding="utf-8")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--text {file} cannot be read ({error}): give a UTF-8 text file."
        ) from error
    if not text.strip():
        raise ConfigError(f"--text {file} is empty: give some kilobytes of prose.")
    return text


def check_all(gate: Gate, perplexities: Mapping[str, float], base: str) -> dict[str, GateError]:
    """Label to why its engine does not pass, for those that do not."""
    found = {}
    for label, perplexity in perplexities.items():
        try:
            gate.check(perplexity, perplexities[base])
        except GateError as error:
            found[label] = error
    return found
