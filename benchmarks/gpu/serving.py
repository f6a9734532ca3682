"""Decode and prefill speed of a random model of 8 B parameters, in real engines that take turns.

    python -m benchmarks.gpu.serving --budget-minutes 9

Engines of a group start together, share the GPU and are asked in turns. Results are written after
each measure; `--resume` goes on where a run stopped, and `--only` names the engines to run. With
`--tiny`, a small model shows on any machine, also without a GPU, that everything runs.

On a machine without installed packages or network, put the repository, its folder `kernels` and
vLLM on PYTHONPATH: the engines register the plugin themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.serving_models import EIGHT_B, GROUPS, TINY, Size, make_specs
from benchmarks.gpu.serving_report import LONG, ONE, Speeds, report
from vllm_quantkit.bench.measures import Decode, Prefill
from vllm_quantkit.bench.rounds import turns
from vllm_quantkit.engine import Engine, EngineError, EngineSpec
from vllm_quantkit.hardware.machine import describe_machine

RESULTS = Path("benchmarks/results/gpu_serving.json")
CACHE = Path(".cache/bench/gpu-serving")
START_SHARE = 0.35
"""Of the budget: engines of a group that do not run by then are left out."""


class GpuEngine(Engine):
    """An engine of random weights."""

    WORKER = "benchmarks.gpu.serving_worker"


def measures(size: Size) -> dict[str, Decode | Prefill]:
    """What is asked of every engine, what the goals need first."""
    return {
        ONE: Decode(1, size.tokens),
        LONG: Decode(1, size.tokens, size.context),
        **{f"decode, {batch} sequences": Decode(batch, size.tokens) for batch in size.batches},
        **{f"prefill, {tokens} tokens": Prefill(tokens) for tokens in size.prompts},
    }


def start(
    names: Sequence[str],
    specs: dict[str, EngineSpec],
    seconds: float,
    speeds: Speeds,
    make: Callable[[EngineSpec, Path, float], GpuEngine] = GpuEngine,
) -> dict[str, GpuEngine]:
    """The engines that start in time, all at once; for the others, the reason is noted."""

    def attempt(name: str) -> GpuEngine | EngineError:
        try:
            return make(specs[name], CACHE / f"{name.replace(' ', '-')}.log", seconds)
        except EngineError as error:
            return error

    with ThreadPoolExecutor(len(names)) as pool:
        tried = dict(zip(names, pool.map(attempt, names), strict=True))
    for name, outcome in tried.items():
        if isinstance(outcome, EngineError):
            speeds.failures[name] = reason(outcome)
    return {name: e for name, e in tried.items() if not isinstance(e, EngineError)}


def reason(error: EngineError) -> str:
    """The last line of an engine's log that names an error, or its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])


def ask_all(
    engines: dict[str, GpuEngine],
    asked: dict[str, Decode | Prefill],
    rounds: int,
    budget: Budget,
    speeds: Speeds,
    save: Callable[[], None],
) -> None:
    """Every measure of every engine in turns, once to warm up, until time runs out."""
    for label, measure in asked.items():
        row = speeds.rates.setdefault(label, {})
        row.update({name: [] for name in engines})
        for number in range(rounds + 1):
            for name in turns(list(engines), number):
                if budget.left <= 0:
                    speeds.unmeasured.append(f"{label}: {name}")
                    continue
                try:
                    rate = measure.ask(engines[name])[measure.rate]
                except EngineError as error:
                    speeds.failures[name] = reason(error)
                    del engines[name]
                else:
                    row[name] += [rate] if number else []  # the first compiles
        save()
        print(f"{label}: {budget.left:.0f} s left", flush=True)


def main() -> None:
    """Entry point."""
    options = _parse_arguments()
    budget = Budget.begin(60 * options.budget_minutes)
    size = TINY if options.tiny else EIGHT_B
    specs = make_specs(size, CACHE / ("tiny" if options.tiny else "8b"))
    path: Path = options.json or (CACHE / "tiny.json" if options.tiny else RESULTS)
    speeds = Speeds(describe_machine())
    if options.resume and path.exists():
        speeds = Speeds.load(path)

    def save() -> None:
        speeds.save(path)
        path.with_suffix(".md").write_text(report(speeds))

    asked = measures(size)
    missing = [n for n in options.only if not complete(speeds, n, asked)]
    for names in batches(missing, options.together):
        if budget.left <= 0:
            speeds.unmeasured += names
            continue
        with ExitStack() as stack:
            engines = start(names, specs, START_SHARE * budget.seconds, speeds)
            for engine in engines.values():
                stack.enter_context(engine)
            print(f"{', '.join(engines)} run: {budget.left:.0f} s left", flush=True)
            ask_all(engines, asked, options.rounds, budget, speeds, save)
    save()
    print(report(speeds))


def batches(names: Sequence[str], together: int) -> Iterator[list[str]]:
    """Engines that run at the same time: some of one group."""
    for group in GROUPS:
        wanted = [name for name in group if name in names]
        for first in range(0, len(wanted), together):
            yield wanted[first : first + together]


def complete(speeds: Speeds, name: str, asked: dict[str, Decode | Prefill]) -> bool:
    """True where every measure of an engine is there."""
    return all(speeds.per_second(label, name) is not None for label in asked)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget-minutes", type=float, default=9)
    parser.add_argument("--only", nargs="+", default=[name for group in GROUPS for name in group])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--together", type=int, default=5, help="engines at a time")
    parser.add_argument("--resume", action="store_true", help="keep what the file has")
    parser.add_argument("--tiny", action="store_true", help="a small model, also on a CPU")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
