"""What `quantkit advise --search` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_quantkit.advise.commands import TEXT, Command
from vllm_quantkit.advise.estimate import Estimator
from vllm_quantkit.advise.quality import SUB_4_BIT
from vllm_quantkit.advise.request import AdviseRequest, SearchRequest
from vllm_quantkit.advise.roofline import LinearClock, RooflineClock, rates_of
from vllm_quantkit.advise.search.budgets import GIB, memory_budget, other_bytes, speed_budget
from vllm_quantkit.advise.search.mixture import Budget, Mixture, Pure, best_mixture, pure_ways
from vllm_quantkit.advise.search.recipe import recipe_of, write_recipe
from vllm_quantkit.advise.search.units import Unit, units_of
from vllm_quantkit.advise.search.ways import Way, measure_ways, read_ways
from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.footprint import Model
from vllm_quantkit.hardware import Device
from vllm_quantkit.quantize.hub import model_folder
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.quantize.plan import Plan, make_plan
from vllm_quantkit.quantize.recipes.recipe_file import OutputFormat, make_recipe
from vllm_quantkit.spec import Frozen
from vllm_quantkit.terminal import Table, Terminal

ADDITIVE = (
    "the sum of the layers' KL divergences stands for that of the mixture; it is measured with "
    "`quantkit eval` once the model is made"
)


class Taken(Frozen):
    """What became of a unit.

    Attributes:
        layers: their names in the checkpoint.
        way: how they are quantised.
        nbytes: of their tensors.
        loss: KL divergence that they add, nats.
    """

    layers: tuple[str, ...]
    way: str
    nbytes: int
    loss: float


class SearchAnswer(Frozen):
    """What `--search` found; its fields are those of `--json`.

    Attributes:
        model: folder or hub name.
        budget: as it was asked for.
        weight_bytes: of all weight files of the mixture.
        loss: sum of the layers' KL divergences, nats.
        gap: how much smaller the least possible sum may be; 0 where it is the least.
        taken: in the order of the model.
        pure: the whole model in one way, for comparison.
        measured: where the layers' divergences come from.
        format: of the checkpoint that the recipe asks for.
        recipe: as in the file.
        recipe_file: where it was written; None where it was not.
        commands: to run next.
        warnings: what to know before trusting it.
    """

    model: str
    budget: str
    weight_bytes: int
    loss: float
    gap: float
    taken: tuple[Taken, ...]
    pure: tuple[Pure, ...]
    measured: tuple[str, ...]
    format: OutputFormat
    recipe: dict[str, Any]
    recipe_file: str | None
    commands: tuple[Command, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A mixture with what it was found among."""

    mixture: Mixture
    units: tuple[Unit, ...]
    budget: Budget
    fmt: OutputFormat
    recipe: dict[str, Any]
    plan: Plan


def run_search(
    request: AdviseRequest,
    model: Model,
    device: Device,
    terminal: Terminal,
    clock: LinearClock | None = None,
) -> int:
    """Finds, writes and prints a mixture; returns the exit status.

    Raises:
        QuantkitError: nothing was measured, nothing fits, or the model cannot be quantised.
    """
    search = request.search
    if search is None or (search.budget_gib is None) == (search.min_speedup is None):
        raise ConfigError(
            "--search needs one budget: --budget-gib for all weights, or --min-speedup of a decode "
            "step over 16 bits."
        )
    folder = model_folder(request.model)
    ways = _ways(request, search, folder, model, terminal)
    rates = rates_of(device)
    estimator = Estimator(model, device, request.workload, rates, clock or RooflineClock(rates))
    found = find(folder, ways, search, estimator)
    if search.recipe_out is not None:
        write_recipe(found.recipe, search.recipe_out, _comment(request.model, found))
    tell(answer_of(request, folder, ways, found), terminal)
    return 0


def find(folder: Path, ways: Sequence[Way], search: SearchRequest, estimator: Estimator) -> Found:
    """The mixture in the first format that can store it, checked as the quantiser would.

    Raises:
        ConfigError: nothing fits the budget.
        UnsupportedScheme: no format stores the ways.
    """
    shell = ModelShell.open(folder)
    *first, last = formats_for(ways)
    for fmt in first:
        try:
            return _find(shell, folder, ways, search, estimator, fmt)
        except UnsupportedScheme:
            continue  # the next format stores more
    return _find(shell, folder, ways, search, estimator, last)


def formats_for(ways: Sequence[Way]) -> tuple[OutputFormat, ...]:
    """compressed-tensors, which others read, where it wastes no bits; `quantkit` stores all."""
    odd = any(way.options.bits not in (None, 4, 8) for way in ways)
    return ("quantkit",) if odd else ("compressed-tensors", "quantkit")


def _find(
    shell: ModelShell,
    folder: Path,
    ways: Sequence[Way],
    search: SearchRequest,
    estimator: Estimator,
    fmt: OutputFormat,
) -> Found:
    units = units_of(shell, ways, fmt)
    budget = (
        memory_budget(folder, units, search.budget_gib)
        if search.budget_gib is not None
        else speed_budget(estimator, units, search.min_speedup or 1.0)
    )
    mixture = best_mixture(units, budget)
    recipe = recipe_of(mixture.taken, fmt)
    if all(option.spec is None for _, option in mixture.taken):
        raise ConfigError(
            f"{budget.words}: the 16-bit model is within it, so there is nothing to quantise."
        )
    return Found(mixture, units, budget, fmt, recipe, make_plan(shell, make_recipe(dict(recipe))))


def answer_of(
    request: AdviseRequest, folder: Path, ways: Sequence[Way], found: Found
) -> SearchAnswer:
    """The answer as data."""
    file = None if request.search is None else request.search.recipe_out
    return SearchAnswer(
        model=request.model,
        budget=found.budget.words,
        weight_bytes=found.mixture.nbytes + other_bytes(folder, found.units),
        loss=found.mixture.choice.loss,
        gap=found.mixture.choice.gap,
        taken=tuple(
            Taken(
                layers=tuple(layer.name for layer in unit.layers),
                way=option.way,
                nbytes=option.nbytes,
                loss=option.loss,
            )
            for unit, option in found.mixture.taken
        ),
        pure=pure_ways(found.units, found.budget),
        measured=tuple(f"{way.name}: {way.origin}" for way in ways),
        format=found.fmt,
        recipe=found.recipe,
        recipe_file=None if file is None else str(file),
        commands=() if file is None else _commands(request, file, found),
        warnings=(ADDITIVE, *_sub_4_bit(found), *found.plan.warnings),
    )


def tell(answer: SearchAnswer, terminal: Terminal) -> None:
    """The answer in sentences, or as JSON."""
    exact = "the least possible" if answer.gap == 0 else f"at most {answer.gap:.2g} above the least"
    terminal.line(
        f"A mixture within {answer.budget}: weights take {answer.weight_bytes / GIB:.3f} GiB, the "
        f"layers' KL divergences add up to {answer.loss:.4g} nats, {exact}."
    )
    rows = [
        (_short(one.layers), one.way, f"{one.nbytes / (1 << 20):.2f}", f"{one.loss:.2g}")
        for one in answer.taken
    ]
    terminal.table(Table("", ("layers", "quantised to", "MiB", "KL, nats"), tuple(rows)))
    pure = [
        (one.way, f"{one.nbytes / (1 << 20):.2f}", f"{one.loss:.4g}", "yes" if one.fits else "no")
        for one in answer.pure
    ]
    columns = ("all layers in", "MiB", "sum of KL, nats", "fits")
    terminal.table(Table("For comparison", columns, tuple(pure)))
    for origin in answer.measured:
        terminal.line(f"measured: {origin}")
    for command in answer.commands:
        terminal.line(f"{command.line}   # {command.purpose}")
    for warning in answer.warnings:
        terminal.warn(warning)
    terminal.result(answer)


def _ways(
    request: AdviseRequest,
    search: SearchRequest,
    folder: Path,
    model: Model,
    terminal: Terminal,
) -> tuple[Way, ...]:
    read = read_ways(request.measured)
    if search.text is not None:
        return (*read, *measure_ways(folder, search, model.facts.parameters, terminal))
    if not read:
        raise ConfigError(
            "--search needs to know what layers cost: give --measure-sensitivity TEXT to measure "
            "it now, or --measured FOLDER of checkpoints that `quantkit eval --by-layer quantise` "
            "has seen."
        )
    return read


def _commands(request: AdviseRequest, file: Path, found: Found) -> tuple[Command, ...]:
    out = f"{Path(request.model).name}-MIXED"
    text = ("--calibration", TEXT)
    make = ("quantkit", "quantize", request.model, "--recipe", str(file), *text, "--out", out)
    serve = ("vllm", "serve", out, "--quantization", "quantkit")
    compare = ("quantkit", "eval", out, "--against", request.model)
    text_for = "quantise it" if found.plan.needs_data else "quantise it; the text is for its report"
    return (
        Command(words=make, purpose=text_for),
        Command(words=serve, purpose="serve it"),
        Command(words=compare, purpose="measure what it cost"),
    )


def _sub_4_bit(found: Found) -> tuple[str, ...]:
    bits = [option.spec.weight.bits for _, option in found.mixture.taken if option.spec is not None]
    if min(bits) >= 4:
        return ()
    known = SUB_4_BIT.get(min(bits))
    figures = "" if known is None else f": others are at {known.low:.2f} to {known.high:.2f} nats"
    few = sum(1 for one in bits if one < 4)
    return (f"{few} groups of layers have fewer than 4 bits, where errors grow fast{figures}.",)


def _comment(model: str, found: Found) -> tuple[str, ...]:
    return (
        f"quantkit quantize {model} --recipe THIS_FILE --out FOLDER",
        f"{found.budget.words}; sum of the layers' KL divergences "
        f"{found.mixture.choice.loss:.4g} nats",
    )


def _short(layers: tuple[str, ...]) -> str:
    """The first name, and how many more."""
    more = f" +{len(layers) - 1}" if len(layers) > 1 else ""
    return layers[0] + more
