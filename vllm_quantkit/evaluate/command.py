"""What `quantkit eval` does: measures, keeps, shows, and judges."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoTokenizer

from vllm_quantkit.cache import cache_folder
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import CheckpointError, ConfigError
from vllm_quantkit.evaluate.by_layer import measure_by_layer
from vllm_quantkit.evaluate.gates import judge
from vllm_quantkit.evaluate.origin import Origin, find_base, read_origin
from vllm_quantkit.evaluate.quality import (
    BaseScores,
    compare_windows,
    measure_base,
    score_windows,
    summarise_windows,
)
from vllm_quantkit.evaluate.request import EvaluateRequest
from vllm_quantkit.evaluate.scorers import backend_version, engine_spec, stores_kv_in_4_bits
from vllm_quantkit.evaluate.sensitivity import LayerSensitivity
from vllm_quantkit.evaluate.showing import show
from vllm_quantkit.evaluate.tasks import (
    TaskPlan,
    TaskScore,
    read_scores,
    require_lm_eval,
    run_tasks,
)
from vllm_quantkit.evaluate.text import load_windows
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.hardware.machine import describe_machine
from vllm_quantkit.long_generation.measure import measure_long_generation
from vllm_quantkit.long_generation.plan import LongPlan
from vllm_quantkit.long_generation.prompts import prompts_of_windows, read_prompts
from vllm_quantkit.long_generation.result import LongGeneration
from vllm_quantkit.quantize.hub import model_folder
from vllm_quantkit.reporting.distribution import Distribution
from vllm_quantkit.reporting.evaluation import Evaluation, Served, write_evaluation
from vllm_quantkit.reporting.files import write_report_files
from vllm_quantkit.terminal import Terminal

PACKAGES = ("vllm-quantkit", "vllm", "torch", "transformers", "lm-eval")

PASSED, FAILED = 0, 1
"""Exit statuses: all limits were kept, or one was not."""


@dataclass(frozen=True)
class Evaluator:
    """One run of the command, everything decided.

    Attributes:
        request: what was asked for.
        folder: of the model.
        origin: of the model.
        base: the 16-bit model; empty where there is none.
        why: there is none.
        terminal: is told how far it is.
    """

    request: EvaluateRequest
    folder: Path
    origin: Origin
    base: str
    why: str
    terminal: Terminal

    @property
    def spec(self) -> EngineSpec:
        """How the model is served."""
        return self.request.spec(str(self.folder))

    @property
    def base_spec(self) -> EngineSpec:
        """How its base is."""
        return self.request.base_spec(self.base)

    @property
    def kept(self) -> Path | None:
        """The folder that results are written to; None where there is none.

        What was quantised while loading is not what its folder holds, so nothing is written there.
        """
        own = self.origin.is_quantised and Path(self.request.model).is_dir()
        beside = self.folder if own and os.access(self.folder, os.W_OK) else None
        return self.request.out or beside

    def stages(self) -> Iterator[Evaluation]:
        """What was measured so far, again after each thing that was asked for.

        Raises:
            QuantkitError: a model cannot be run, or there is no text.
        """
        windows = load_windows(self.folder, self.origin, self.request.text)
        found = self._quality(windows, self._base_scores(windows))
        yield found
        if self.request.by_layer is not None:
            found = found.model_copy(update={"by_layer": self._by_layer(windows)})
            yield found
        if self.request.tasks is not None:
            found = found.model_copy(update={"tasks": self._tasks(self.request.tasks)})
            yield found
        if self.request.long is not None:
            update = {"long_generation": self._long(windows, self.request.long)}
            yield found.model_copy(update=update)

    def _base_scores(self, windows: Windows) -> BaseScores | None:
        if not self.base:
            return None
        return measure_base(
            self.base_spec, windows, backend=self.request.backend, terminal=self.terminal
        )

    def _quality(self, windows: Windows, base: BaseScores | None) -> Evaluation:
        backend = self.request.backend
        scores = score_windows(self.spec, windows, base, backend=backend, terminal=self.terminal)
        version = backend_version(backend)
        quality = None if base is None else compare_windows(scores, windows, version)
        alone = summarise_windows(scores, windows, version) if base is None else None
        return Evaluation(
            model=self._served(self.spec, windows),
            base=self._served(self.base_spec, windows) if self.base else None,
            backend=version,
            versions=dict(_versions()),
            machine=describe_machine(),
            source=windows.source,
            fingerprint=windows.fingerprint,
            perplexity=alone,
            quality=quality,
            distribution=Distribution.of(scores),
            warnings=tuple(self.warnings()),
        )

    def _served(self, spec: EngineSpec, windows: Windows) -> Served:
        if self.request.backend == "hf":
            return Served.of(replace(spec, max_model_len=windows.length))
        return Served.of(engine_spec(spec, windows.length))

    def _by_layer(self, windows: Windows) -> tuple[LayerSensitivity, ...]:
        method = self.request.by_layer
        assert method is not None
        few = Windows(windows.rows[: self.request.by_layer_windows], windows.source)
        spec = EngineSpec(self.spec.model, self.spec.quantization, options=self._hf_options())
        base = EngineSpec(self.base)
        return measure_by_layer(spec, base, few, method, terminal=self.terminal)

    def _hf_options(self) -> tuple[tuple[str, object], ...]:
        """Layer by layer, transformers computes in float32."""
        return tuple((k, v) for k, v in self.spec.options if k == "additional_config")

    def _tasks(self, plan: TaskPlan) -> tuple[TaskScore, ...]:
        out = (self.kept or cache_folder("tasks", self.folder.name)) / "lm_eval"
        runs = [("model", self.spec)] + ([("base", self.base_spec)] if self.base else [])
        with self.terminal.phase("tasks", len(runs)) as tick:
            results = []
            for name, spec in runs:
                results.append(run_tasks(spec, plan, out / name))
                tick()
        return read_scores(plan, *results)

    def _long(self, windows: Windows, plan: LongPlan) -> LongGeneration:
        path = self.request.long_prompts
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        found = read_prompts(path, tokenizer, plan) if path else prompts_of_windows(windows, plan)
        return measure_long_generation(
            self.base_spec,
            self.spec,
            found,
            plan,
            max_length=self.origin.max_length,
            terminal=self.terminal,
        )

    def warnings(self) -> Iterator[str]:
        """What a reader should know of how it is measured."""
        if not self.base:
            yield f"there is no 16-bit model to compare with, only perplexity: {self.why}."
        if self.request.backend == "vllm" and stores_kv_in_4_bits(self.spec):
            yield (
                "every key and value was read back from the 4-bit cache (prefill = cached), also "
                "where serving attends to a prompt's own before they are rounded: what is shown is "
                "the error of long texts, and short prompts lose less."
            )


def run_evaluate(request: EvaluateRequest, terminal: Terminal) -> int:
    """Measures what was asked for, writes it beside the checkpoint and shows it; the exit status.

    Raises:
        QuantkitError: something cannot be measured as it was asked for.
    """
    evaluator = prepare(request, terminal)
    evaluation = None
    try:
        for found in evaluator.stages():
            evaluation = found
    finally:
        # What follows may fail where hours of measuring before it did not.
        if evaluation is not None:
            _keep(evaluator.kept, evaluation, terminal)
    assert evaluation is not None
    show(evaluation, terminal)
    return _judged(request, evaluation, terminal)


def prepare(request: EvaluateRequest, terminal: Terminal) -> Evaluator:
    """Finds both models, and refuses what cannot be measured before anything is.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: something needs a 16-bit model, and there is none.
    """
    folder = model_folder(request.model)
    origin = read_origin(folder)
    base, why = find_base(origin, request.model, request.against, request.changes_the_model)
    needing = {
        "a limit of what quantising costs": request.gates.need_base,
        "--by-layer": request.by_layer is not None,
        "--long": request.long is not None,
    }
    for what, wanted in needing.items():
        if wanted and not base:
            raise ConfigError(
                f"{what} needs the 16-bit model to compare with, but {why}: pass --against BASE."
            )
    if request.tasks is not None:
        require_lm_eval()
    evaluator = Evaluator(request, folder, origin, base, why, terminal)
    if evaluator.kept is None:
        terminal.note("results are shown, not kept: pass --out FOLDER for a report.")
    return evaluator


def _keep(folder: Path | None, evaluation: Evaluation, terminal: Terminal) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made ({error}): give another --out.") from error
    report = write_evaluation(folder, evaluation)
    files = write_report_files(folder, evaluation)
    terminal.note(f"written: {report}, {files.markdown}, {files.html}")
    if files.note:
        terminal.note(files.note)


def _judged(request: EvaluateRequest, evaluation: Evaluation, terminal: Terminal) -> int:
    """Says which limits were not kept, and which were close."""
    status = PASSED
    for verdict in judge(request.gates, evaluation.quality, evaluation.tasks):
        if verdict.failed:
            terminal.error(f"{verdict.sentence}.")
            status = FAILED
        else:
            terminal.note(f"{verdict.sentence}.")
        if verdict.close:
            terminal.warn(
                f"{verdict.sentence}: the limit lies inside the interval, so other text may decide "
                "otherwise; more --windows would tell."
            )
    return status


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
