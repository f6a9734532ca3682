"""Scores of tasks, by lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

It runs in a process of its own, with vLLM as its engine; its result files stay as it wrote them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.engine.client import ENVIRONMENT
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.intervals import Interval, normal_interval
from vllm_quantkit.spec import Frozen

UNREACHABLE = ("Couldn't reach", "OfflineModeIsEnabled", "ConnectionError", "LocalEntryNotFound")
"""What its log says where a task's data are not there."""

TAIL = 12
"""Lines of its log that an error quotes."""

LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "brier", "ter")
"""Parts of the names of metrics that lm-eval's results do not tell the direction of."""


class TaskScore(Frozen):
    """One metric of one task.

    Attributes:
        task: name.
        metric: with its filter, as lm-eval names it, such as `acc,none`.
        higher_is_better: False for errors.
        score: of the model; intervals are 1.96 standard errors over the task's questions.
        base: the 16-bit model's; None where there is none.
        drop: what the model is worse by; its standard error takes both scores for independent,
            which is wider than the truth, since both answered the same questions.
        results: lm-eval's file for the model.
        base_results: and for the base.
    """

    task: str
    metric: str
    higher_is_better: bool = True
    score: Interval
    base: Interval | None = None
    drop: Interval | None = None
    results: str
    base_results: str | None = None


class TaskPlan(Frozen):
    """Which tasks, and how many of their questions.

    Attributes:
        names: as lm-eval knows them.
        folder: with tasks of one's own, in lm-eval's YAML.
        limit: questions of each; None for all.
        fewshot: examples in each prompt; None as the task says.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    fewshot: int | None = None


def run_tasks(spec: EngineSpec, plan: TaskPlan, out: Path) -> Path:
    """lm-eval's result file, in a new folder below `out`.

    Args:
        spec: the model.
        plan: the tasks.
        out: folder for what lm-eval writes, with its log beside it.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, or its data are not there.
    """
    require_lm_eval()
    out.mkdir(parents=True, exist_ok=True)
    before, log = set(out.rglob("results_*.json")), out / "lm_eval.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command(spec, plan, out),
            stdout=stream,
            stderr=stream,
            env={**ENVIRONMENT, **os.environ},
            start_new_session=True,  # an engine's ranks end with it
        )
        try:
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    written = set(out.rglob("results_*.json")) - before
    if status or not written:
        raise _failed(log, plan)
    return max(written, key=lambda path: path.stat().st_mtime_ns)


def command(spec: EngineSpec, plan: TaskPlan, out: Path) -> list[str]:
    """The words that run lm-eval with the model of `spec` in vLLM."""
    arguments = {
        "pretrained": spec.model,
        **({} if spec.quantization is None else {"quantization": spec.quantization}),
        **dict(spec.options),
    }
    words = [sys.executable, "-m", "lm_eval", "--model", "vllm", "--batch_size", "auto"]
    words += ["--model_args", json.dumps(arguments), "--tasks", ",".join(plan.names)]
    words += ["--output_path", str(out), "--log_samples"]
    for name, value in (
        ("--include_path", plan.folder),
        ("--limit", plan.limit),
        ("--num_fewshot", plan.fewshot),
    ):
        if value is not None:
            words += [name, str(value)]
    return words


def require_lm_eval() -> None:
    """Refuses to begin without it.

    Raises:
        ConfigError: says how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-eval, which is not installed: pip install 'vllm-quantkit[eval]', or "
            "leave --tasks out."
        )


def read_scores(
    plan: TaskPlan, results: Path, base_results: Path | None = None
) -> tuple[TaskScore, ...]:
    """Every metric of every task that was asked for, beside the base's.

    Args:
        plan: the tasks; of a group, its mean is taken where lm-eval gives one, else its tasks.
        results: lm-eval's file for the model.
        base_results: and for the base; None where there is none.

    Raises:
        ConfigError: a file is not one of lm-eval's.
    """
    found = _read(results)
    before = {} if base_results is None else _read(base_results)["results"]
    tasks = [name for name in plan.names if name in found["results"]] or list(found["results"])
    return tuple(
        _score(task, metric, found, before, results, base_results)
        for task in tasks
        for metric in _metrics(found["results"][task])
    )


def _score(
    task: str,
    metric: str,
    found: Mapping[str, Any],
    before: Mapping[str, Any],
    results: Path,
    base_results: Path | None,
) -> TaskScore:
    score = found["results"][task]
    rising = _rises(found.get("higher_is_better", {}).get(task) or {}, metric.partition(",")[0])
    base = before.get(task, {})
    known = metric in base
    return TaskScore(
        task=task,
        metric=metric,
        higher_is_better=rising,
        score=normal_interval(score[metric], _error(score, metric)),
        base=normal_interval(base[metric], _error(base, metric)) if known else None,
        drop=_drop(score, base, metric, rising) if known else None,
        results=str(results),
        base_results=None if base_results is None else str(base_results),
    )


def _drop(score: Mapping[str, Any], base: Mapping[str, Any], metric: str, rising: bool) -> Interval:
    more, less = (base, score) if rising else (score, base)
    error = math.hypot(_error(score, metric), _error(base, metric))
    return normal_interval(more[metric] - less[metric], error)


def _rises(known: Mapping[str, Any], metric: str) -> bool:
    if isinstance(known.get(metric), bool):
        return bool(known[metric])
    return not any(part in metric for part in LOWER_IS_BETTER)


def _metrics(scores: Mapping[str, Any]) -> Sequence[str]:
    """Names with a filter behind a comma, whose value is a number; standard errors aside."""
    return [
        name
        for name, value in scores.items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    ]


def _error(scores: Mapping[str, Any], metric: str) -> float:
    """The standard error, NaN where lm-eval gives none ("N/A")."""
    name, _, filtered = metric.partition(",")
    value = scores.get(f"{name}_stderr,{filtered}")
    return float(value) if isinstance(value, int | float) else math.nan


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): run the tasks again.") from error
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise ConfigError(f"{path} holds no results of lm-eval: run the tasks again.")
    return content


def _failed(log: Path, plan: TaskPlan) -> ConfigError:
    lines = log.read_text(errors="replace").splitlines()
    text, names = "\n".join(lines), ", ".join(plan.names)
    if any(word in text for word in UNREACHABLE):
        return ConfigError(
            f"the data of {names} could not be loaded (lm-eval's log: {log}): run it once "
            "where the hub can be reached, which keeps them in the cache, or give tasks over local "
            "files with --tasks-path."
        )
    tail = "\n".join(lines[-TAIL:])
    return ConfigError(f"lm-eval could not run {names}; {log} ends:\n{tail}")
