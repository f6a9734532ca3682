"""The race: all contenders of a problem take turns, on weights that no cache holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from benchmarks.gpu.contender import Contender, Layer
from benchmarks.gpu.inputs import activations
from benchmarks.gpu.problems import Problem, moved_bytes, operations
from benchmarks.gpu.results import Ceilings, Row
from benchmarks.gpu.timing import (
    Call,
    Recording,
    Times,
    copies_beyond_cache,
    cycle,
    race,
    record,
)

T = TypeVar("T")

COPY_BYTES, CPU_COPY_BYTES = 2 << 30, 8 << 20
PRODUCT_SIZE, CPU_PRODUCT_SIZE = 8192, 256


def measure_ceilings() -> Ceilings:
    """Copy bandwidth and bfloat16 product rate of this machine."""
    cuda = torch.cuda.is_available()
    nbytes = COPY_BYTES if cuda else CPU_COPY_BYTES
    size = PRODUCT_SIZE if cuda else CPU_PRODUCT_SIZE
    place = {"device": "cuda" if cuda else "cpu", "dtype": torch.bfloat16}
    source = torch.randn(nbytes // 2, **place)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, **place)
    field = {
        "copy": record([partial(target.copy_, source)]),
        "product": record([partial(torch.mm, a, b)] * 4),
    }
    times = race(field)
    copied, product = (1e-3 * times[name].median for name in field)
    return Ceilings(2 * nbytes / copied, 2 * size**3 / product)


MAX_COPIES = 64
"""Of activations, when a few tokens' stay in the cache in models, too."""


@dataclass(frozen=True)
class Entrant:
    """A contender with copies of its layer: several, where it has weights."""

    contender: Contender
    layers: Sequence[Layer]


class Course:
    """A problem with its contenders loaded.

    Args:
        problem: what is computed.
        contenders: those that passed the gate.
        device: where.
        report: takes a sentence about what fails.
    """

    def __init__(
        self,
        problem: Problem,
        contenders: Sequence[Contender],
        device: str,
        report: Callable[[str], None],
    ) -> None:
        self.problem, self._report = problem, report
        self._generator = torch.Generator(device).manual_seed(0)
        found = [self._try(c, partial(self._enter, c)) for c in contenders]
        self._entrants = [entrant for entrant in found if entrant is not None]

    def run(self, m: int, ceilings: Ceilings) -> list[Row]:
        """Times at `m` tokens."""
        made = {}
        for entrant in self._entrants:
            found = self._try(entrant.contender, partial(self._record, entrant, m, ceilings))
            if found is not None:
                made[entrant.contender] = found
        times = race({contender.name: recording for contender, (recording, _) in made.items()})
        counts = {contender: copies for contender, (_, copies) in made.items()}
        made.clear()
        torch.cuda.empty_cache()  # a graph's memory serves no other
        return [self._row(c, m, copies, times[c.name]) for c, copies in counts.items()]

    def _try(self, contender: Contender, make: Callable[[], T]) -> T | None:
        """What `make` makes; None, and a sentence, where it fails, for whatever reason."""
        try:
            return make()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            what = f"{type(error).__name__}: {lines[0]}"
            self._report(f"{contender.name}, {self.problem.name}: {what}")
            return None

    def _enter(self, contender: Contender) -> Entrant:
        problem = self.problem
        if problem.op != "linear":
            return Entrant(contender, [contender.make(problem.k)])
        weight = contender.kind.random(problem.n, problem.k, self._generator)
        layer = contender.make(weight)
        count = copies_beyond_cache(int(contender.kind.nbytes(problem.n, problem.k)))
        others = [copy.deepcopy(layer) for _ in range(min(count, MAX_COPIES) - 1)]
        return Entrant(contender, [layer, *others])

    def _record(self, entrant: Entrant, m: int, ceilings: Ceilings) -> tuple[Recording, int]:
        """A recording, and the copies of the data that its calls go through."""
        contender = entrant.contender
        nbytes = moved_bytes(self.problem, contender.kind, m)
        least = ceilings.least_ms(nbytes, operations(self.problem, m))
        calls = self._calls(entrant, m)
        return record(cycle(calls, least), graph=contender.graph), len(calls)

    def _calls(self, entrant: Entrant, m: int) -> list[Call]:
        """The call on each copy: of the weights, or of the activations where there are none."""
        layers = entrant.layers
        x = activations(entrant.contender, self.problem, m, self._generator)
        if self.problem.op == "linear":
            inputs = layers[0].prepare(x)
            return [partial(layer, inputs) for layer in layers]
        count = min(copies_beyond_cache(x.numel() * x.element_size()), MAX_COPIES)
        return [partial(layers[0], layers[0].prepare(x.clone())) for _ in range(count)]

    def _row(self, contender: Contender, m: int, copies: int, times: Times) -> Row:
        problem = self.problem
        return Row(
            problem=problem.name,
            op=problem.op,
            kind=contender.kind.name,
            contender=contender.name,
            m=m,
            n=problem.n,
            k=problem.k,
            ms=times.median,
            low=times.low,
            high=times.high,
            nbytes=moved_bytes(problem, contender.kind, m),
            operations=operations(problem, m),
            copies=copies,
            graph=contender.graph,
        )
