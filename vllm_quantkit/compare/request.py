"""What `quantkit compare` is asked, read from the options of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vllm_quantkit.bench.requests import ENGINE, BenchRequest
from vllm_quantkit.bench.requests import read_request as read_bench
from vllm_quantkit.compare.result import Step
from vllm_quantkit.compare.rows import Row, choose_rows
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.tasks import TaskPlan
from vllm_quantkit.evaluate.text import TextOptions
from vllm_quantkit.quantize.calibration import CalibrationOptions, read_calibration_options
from vllm_quantkit.quantize.job import run_options
from vllm_quantkit.quantize.run_options import RunOptions
from vllm_quantkit.spec import Frozen

Read = TypeVar("Read", bound=Frozen)

BENCH = ("batches", "prompts", "tokens", "rounds", "gate", "together", *ENGINE)
"""Options that mean what they mean to `quantkit bench`."""

TEXT = {"text": "source", "windows": "windows", "window_length": "length"}
"""Option to field of `TextOptions`."""

TASKS = {"tasks_path": "folder", "tasks_limit": "limit", "tasks_fewshot": "fewshot"}
"""Option to field of `TaskPlan`."""

DECODE_AND_PREFILL = {"load": 0, "mixed": 0}
"""Of what `quantkit bench` asks, the table has these alone."""

QUICK: Mapping[str, Any] = {
    "samples": 16,
    "allow_few_samples": True,
    "windows": 4,
    "window_length": 256,
    "batches": "1",
    "prompts": "128",
    "tokens": 8,
    "rounds": 1,
    "enforce_eager": True,
}
"""Options of the reduced form, where the user gives no others."""


class CompareRequest(Frozen):
    """What is compared, how, and where the table goes.

    Attributes:
        model: folder or name on the hub, in 16 bits.
        rows: ways to serve it, the 16-bit model first.
        steps: what is measured.
        tasks: of lm-eval.
        calibration: what the quantiser calibrates on.
        run: how it goes about it.
        text: held out; without a source, what `calibration` holds out of its own.
        bench: how speeds are measured, and how engines are started.
        quick: True for the reduced form.
        out: folder of the files; None for `quantkit-compare/` and the model's name.
        work: folder of checkpoints and measurements; None is in the cache folder.
        fresh: True forgets what earlier runs made and measured.
    """

    model: str
    rows: tuple[Row, ...]
    steps: frozenset[Step]
    tasks: TaskPlan = TaskPlan(names=())
    calibration: CalibrationOptions
    run: RunOptions = RunOptions()
    text: TextOptions = TextOptions()
    bench: BenchRequest
    quick: bool = False
    out: Path | None = None
    work: Path | None = None
    fresh: bool = False


def read_request(options: Mapping[str, Any]) -> CompareRequest:
    """The request behind the options that were given, by their names.

    Raises:
        ConfigError: names the option, the value and what is allowed.
    """
    quick = bool(options.get("quick"))
    given = {**QUICK, **options} if quick else dict(options)
    if "windows" in given and "text" not in given:
        given.setdefault("held_out", given["windows"])
    tasks = _checked(TaskPlan, TASKS, given, names=_names(given.get("tasks", "")))
    steps: set[Step] = {step for step in ("quality", "speed") if given.get(step, True)}
    bench = {name: given[name] for name in BENCH if name in given}
    return _checked(
        CompareRequest,
        {name: name for name in ("out", "work", "fresh")},
        given,
        model=given["model"],
        rows=choose_rows(given.get("rows"), given.get("add", ())),
        steps=frozenset(steps | {"tasks"} if tasks.names else steps),
        tasks=tasks,
        calibration=read_calibration_options(_known(given, CalibrationOptions)),
        run=run_options(_known(given, RunOptions)),
        text=_checked(TextOptions, TEXT, given),
        bench=read_bench({"model": given["model"], **DECODE_AND_PREFILL, **bench}),
        quick=quick,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _checked(
    kind: type[Read], fields: Mapping[str, str], given: Mapping[str, Any], **others: Any
) -> Read:
    """A frozen object of the options in `fields`, an option's name to the field's, and others.

    Raises:
        ConfigError: names the option, the value and what is allowed.
    """
    options = {field: option for option, field in fields.items()}
    chosen = {field: given[option] for option, field in fields.items() if option in given}
    try:
        return kind.model_validate({**chosen, **others})
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        name = options.get(field, field).replace("_", "-")
        raise ConfigError(f"--{name} {first['input']!r}: {first['msg']}.") from error


def _known(given: Mapping[str, Any], kind: type[Frozen]) -> dict[str, Any]:
    """Of the options given, those that are fields of `kind`."""
    return {name: given[name] for name in kind.model_fields if given.get(name) is not None}
