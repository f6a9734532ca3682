"""What a benchmark found, and what may be concluded from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import computed_field

from vllm_quantkit.bench.noise import Noise
from vllm_quantkit.bench.quantities import QUANTITIES, TAILS, Key, title
from vllm_quantkit.bench.rounds import Rounds, count_rounds
from vllm_quantkit.bench.samples import LEAST_CONFIDENCE, Better, Ratio, Sample, speed_up
from vllm_quantkit.spec import Frozen


class Entry(Frozen):
    """One quantity of one scheme.

    Attributes:
        quantity: its name.
        at: the batch, length or rate it is at.
        unit: of the sample.
        better: which way is faster.
        sample: what was measured.
        ratio: how many times as fast as the baseline; None for the baseline itself.
    """

    quantity: str
    at: float
    unit: str
    better: Better
    sample: Sample
    ratio: Ratio | None = None

    @property
    def key(self) -> Key:
        """Which quantity."""
        return Key(self.quantity, self.at)


class Row(Frozen):
    """One scheme, or one server.

    Attributes:
        label: its name.
        served: model, method and options of the engine, or the address of the server.
        perplexity: of a short text, which was compared with the baseline's; None for servers.
        weight_bytes: of one rank; None for servers and where it failed.
        cache_tokens: that the KV cache holds; None as before.
        peak_bytes: of one rank; None as before.
        entries: what was measured.
        failure: why there are no entries; empty where there are.
    """

    label: str
    served: dict[str, Any]
    perplexity: float | None = None
    weight_bytes: int | None = None
    cache_tokens: int | None = None
    peak_bytes: int | None = None
    entries: tuple[Entry, ...] = ()
    failure: str = ""

    def entry(self, key: Key) -> Entry | None:
        """The entry of a quantity; None where it was not measured."""
        return next((entry for entry in self.entries if entry.key == key), None)


class BenchResult(Frozen):
    """All schemes beside each other.

    Attributes:
        machine: processor and versions.
        base: label that ratios are of; None where nothing was measured.
        rounds: in each, everything was measured once.
        conditions: how engines or servers were asked.
        rows: in the order in which they were asked for.
        noise: how still the machine was.
    """

    machine: str
    base: str | None
    rounds: int
    conditions: dict[str, Any]
    rows: tuple[Row, ...]
    noise: Noise

    @computed_field  # type: ignore[prop-decorator]
    @property
    def undecided(self) -> tuple[str, ...]:
        """What the rounds do not tell, a sentence each."""
        return tuple(_undecided(self.rows, self.base))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def conclusive(self) -> bool:
        """True where something was measured, and every difference could be told from noise.

        The 99th percentiles do not count: single outliers decide them.
        """
        return self.base is not None and not self.undecided

    @property
    def measured(self) -> list[Row]:
        """Rows that did not fail."""
        return [row for row in self.rows if row.entries]

    @property
    def keys(self) -> list[Key]:
        """Quantities that any row has, in the order in which they are shown."""
        found = {entry.key for row in self.rows for entry in row.entries}
        order = list(QUANTITIES)
        return sorted(found, key=lambda key: (order.index(key.quantity), key.at))


def entries(samples: Mapping[Key, Sample], base: Mapping[Key, Sample] | None) -> tuple[Entry, ...]:
    """The samples of one row with their ratios to the baseline's; None for the baseline's own."""
    return tuple(
        Entry(
            quantity=key.quantity,
            at=key.at,
            unit=QUANTITIES[key.quantity].unit,
            better=QUANTITIES[key.quantity].better,
            sample=sample,
            ratio=None
            if base is None
            else speed_up(sample, base[key], QUANTITIES[key.quantity].better),
        )
        for key, sample in samples.items()
    )


def rows_of(rounds: Rounds[Any], served: Mapping[str, dict[str, Any]]) -> list[Row]:
    """A row for each label of `served`, the first that did not fail being the baseline."""
    samples = rounds.samples()
    base = next(iter(rounds.alive(served)), None)
    return [
        Row(
            label=label,
            served=how,
            entries=entries(samples[label], None if label == base else samples[str(base)])
            if label in samples
            else (),
            failure=rounds.failures.get(label, ""),
        )
        for label, how in served.items()
    ]


def _undecided(rows: Sequence[Row], base: str | None) -> Iterator[str]:
    measured = {row.label: row for row in rows if row.entries}
    if base is None or base not in measured:
        return
    others = [row for label, row in measured.items() if label != base]
    few = _too_few(others)
    if few:
        yield few
        return
    for row in others or [measured[base]]:
        for entry in row.entries:
            if entry.quantity not in TAILS and (why := _doubt(entry, measured[base])):
                yield f"{title(entry.key)}: {row.label}{why}"


def _too_few(rows: Sequence[Row]) -> str:
    """What to do where rounds are too few for any interval; empty where they suffice."""
    for row in rows:
        for entry in row.entries:
            if entry.ratio is not None and entry.ratio.confidence < LEAST_CONFIDENCE:
                return (
                    f"too few to conclude from: {count_rounds(len(entry.sample.rounds))}, whose "
                    f"range holds the true ratio with {entry.ratio.confidence:.0%}. Give --rounds "
                    "5 or more."
                )
    return ""


def _doubt(entry: Entry, base: Row) -> str:
    """Why an entry allows no conclusion; empty where it does."""
    if entry.ratio is None:
        if not entry.sample.noisy:
            return ""
        return f": too noisy to conclude: the spread is {entry.sample.spread:.0%}."
    if entry.ratio.verdict != "undecided":
        return ""
    reference = base.entry(entry.key)
    spread = max(entry.sample.spread, 0 if reference is None else reference.sample.spread)
    return (
        f" against {base.label}: too noisy to conclude: the spread is {spread:.0%}, the difference "
        f"{abs(entry.ratio.median - 1):.0%}."
    )
