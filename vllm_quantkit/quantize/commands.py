"""What the commands `quantkit quantize`, `calibrate` and `calibrate-kv` do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.kv_calibration import write_kv_calibration
from vllm_quantkit.quantize.activation_stats import write_activation_stats
from vllm_quantkit.quantize.calibration import (
    CalibrationOptions,
    TokenSets,
    read_calibration_options,
)
from vllm_quantkit.quantize.collecting import collect_ranges
from vllm_quantkit.quantize.estimate import estimate
from vllm_quantkit.quantize.hub import hub_name, model_folder
from vllm_quantkit.quantize.job import Job, run_options
from vllm_quantkit.quantize.kv_cache.calibrating import calibrate_kv_cache, kv_options
from vllm_quantkit.quantize.kv_cache.telling import closing_lines, table_lines, warnings
from vllm_quantkit.quantize.output.report import render_lines
from vllm_quantkit.quantize.output.workspace import refuse_existing
from vllm_quantkit.quantize.progress import watching
from vllm_quantkit.quantize.recipes.presets import KEEP
from vllm_quantkit.quantize.recipes.recipe_file import Recipe, read_recipe
from vllm_quantkit.quantize.run_options import GIB, RunOptions
from vllm_quantkit.spec import Frozen
from vllm_quantkit.terminal import Terminal

NOTHING = Recipe(scheme=KEEP)
"""Of a run that only looks."""


def run_quantize(
    model: str,
    out: Path | None,
    recipe: Path | None,
    given: Mapping[str, Any],
    terminal: Terminal,
    *,
    dry_run: bool,
) -> None:
    """Quantises `model` into `out` and prints what that cost; or only the plan.

    Args:
        model: folder or hub name.
        out: the new folder.
        recipe: a YAML file; options on the command line go over it.
        given: options on the command line.
        terminal: where to speak.
        dry_run: True only plans.

    Raises:
        QuantkitError: see `Job` and `pipeline.quantize`.
    """
    written = {} if recipe is None else read_recipe(recipe)
    job = Job.prepare(
        model,
        _recipe_keys(written, given),
        {**_calibration_keys(written), **_known(given, CalibrationOptions)},
        _known(given, RunOptions),
    )
    if dry_run:
        plan = estimate(job)
        for line in plan.lines():
            terminal.line(line)
        terminal.result(plan.summary())
        return
    if out is None:
        raise ConfigError("no place to write to was given: pass --out FOLDER.")
    refuse_existing(out)
    job = job.rehearsing(given.get("layers"))
    sets = job.token_sets()
    for warning in () if sets is None else sets.warnings:
        terminal.warn(warning)
    with watching(terminal) as watcher:
        report = job.quantize(out, sets, watcher)
    for line in render_lines(report):
        terminal.line(line)
    terminal.line(f"peak memory: {report.resources.host_bytes / GIB:.2f} GiB on the host")
    if report.resources.device_bytes is not None:
        terminal.line(f"peak memory: {report.resources.device_bytes / GIB:.2f} GiB on the device")
    terminal.line(f"serve it: vllm serve {out}")
    terminal.result(report)


def run_calibrate(model: str, out: Path, given: Mapping[str, Any], terminal: Terminal) -> None:
    """Writes the largest input of every channel of every layer of `model` to `out`.

    Raises:
        QuantkitError: see `Job` and `collect_ranges`.
    """
    refuse_existing(out)
    job, sets = _looking(model, {**given, "held_out": 1}, terminal)
    with watching(terminal) as watcher:
        stats = collect_ranges(job.source, sets.calibration, run=job.run, watcher=watcher)
    largest = {name: ranges.absmax for name, ranges in stats.items()}
    write_activation_stats(largest, out, tokens=sets.calibration.tokens)
    tokens = sets.calibration.tokens
    terminal.line(f"{out}: {len(largest)} layers, {tokens:,} tokens.")
    terminal.result({"file": str(out), "layers": len(largest), "tokens": tokens})


def run_calibrate_kv(
    model: str, out: Path, bound: float | None, given: Mapping[str, Any], terminal: Terminal
) -> None:
    """Writes what a cache of 4 bits should know of the keys of `model` to the folder `out`.

    Raises:
        QuantkitError: see `Job`, `calibrate_kv_cache` and `write_kv_calibration`.
    """
    refuse_existing(out)
    options = kv_options(bound)
    job, sets = _looking(model, given, terminal)
    with watching(terminal) as watcher:
        found = calibrate_kv_cache(
            job.source,
            sets,
            run=job.run,
            options=options,
            watcher=watcher,
            model_name=hub_name(model),
        )
    write_kv_calibration(found, out)
    for line in table_lines(found):
        terminal.line(line)
    for warning in warnings(found):
        terminal.warn(warning)
    for line in closing_lines(found, model, job.source, out):
        terminal.line(line)
    terminal.result(found.summary)


def _looking(model: str, given: Mapping[str, Any], terminal: Terminal) -> tuple[Job, TokenSets]:
    """A run that only looks, and its text; prints what the user should be warned of.

    Raises:
        QuantkitError: there is no such model, or too little text.
    """
    options = read_calibration_options(_known(given, CalibrationOptions))
    job = Job(model, model_folder(model), NOTHING, options, run_options(_known(given, RunOptions)))
    sets = job.token_sets()
    if sets is None:
        raise ConfigError("no calibration text was given: pass --calibration FILE.")
    for warning in sets.warnings:
        terminal.warn(warning)
    return job, sets


def _known(given: Mapping[str, Any], model: type[Frozen]) -> dict[str, Any]:
    """Of the options given, those that are fields of `model`."""
    return {name: given[name] for name in model.model_fields if given.get(name) is not None}


def _calibration_keys(written: Mapping[str, Any]) -> dict[str, Any]:
    keys = written.get("calibration", {})
    if not isinstance(keys, dict):
        raise ConfigError(
            f"calibration = {keys!r} in the recipe: must be a mapping such as 'source: text.txt'."
        )
    return keys


def _recipe_keys(written: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The file's keys with the command line's over them."""
    keys = {name: value for name, value in written.items() if name != "calibration"}
    keys |= {name: value for name, value in _known(given, Recipe).items() if name != "layers"}
    if "output_format" in given:
        keys["format"] = given["output_format"]
    if "ignore" in given:
        kept = {"match": given["ignore"], "scheme": KEEP}
        keys["layers"] = [kept, *keys.get("layers", ())]
    return keys
