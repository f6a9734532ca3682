"""What a check gathers on its way: it goes on after a refusal, to find the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm_quantkit.check.report import Blocker, Subject
from vllm_quantkit.errors import CheckpointError, ConfigError, QuantkitError


class Findings:
    """Blockers and warnings, each once, in the order found.

    Attributes:
        blockers: why the model would not be served.
        warnings: what works otherwise than one may expect.
    """

    def __init__(self) -> None:
        self.blockers: list[Blocker] = []
        self.warnings: list[str] = []

    @contextmanager
    def attempt(self, subject: Subject | None, *layers: str) -> Iterator[None]:
        """A refusal inside becomes a blocker; without a subject its kind tells what it is about."""
        try:
            yield
        except QuantkitError as error:
            self.block(subject or _subject(error), str(error), *layers)

    def block(self, subject: Subject, sentence: str, *layers: str) -> None:
        """Something stands in the way; said once of all layers that it is true of."""
        blocker = Blocker(subject=subject, sentence=sentence, layers=layers)
        for place, known in enumerate(self.blockers):
            if _unnamed(known) == _unnamed(blocker):
                together = tuple(dict.fromkeys((*known.layers, *layers)))
                self.blockers[place] = known.model_copy(update={"layers": together})
                return
        self.blockers.append(blocker)

    def warn(self, sentence: str) -> None:
        """Something works otherwise than one may expect."""
        if sentence and sentence not in self.warnings:
            self.warnings.append(sentence)


def _unnamed(blocker: Blocker) -> str:
    """The sentence without the first layer that it names."""
    return blocker.sentence.replace(blocker.layers[0] if blocker.layers else "", "", 1)


def _subject(error: QuantkitError) -> Subject:
    if isinstance(error, CheckpointError):
        return "checkpoint"
    return "options" if isinstance(error, ConfigError) else "layers"
