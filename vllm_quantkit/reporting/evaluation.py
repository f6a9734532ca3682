"""What was measured of a checkpoint, kept beside it under `evaluation` of quantkit_report.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, ValidationError

from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.evaluate.quality import Perplexity, Quality
from vllm_quantkit.evaluate.sensitivity import LayerSensitivity
from vllm_quantkit.evaluate.tasks import TaskScore
from vllm_quantkit.long_generation.result import LongGeneration
from vllm_quantkit.one_step import write_in_one_step
from vllm_quantkit.quantize.output.report import REPORT_FILE
from vllm_quantkit.reporting.distribution import Distribution
from vllm_quantkit.spec import Frozen
from vllm_quantkit.terminal import to_json

__all__ = ["REPORT_FILE", "Evaluation", "Served", "read_evaluation", "write_evaluation"]

KEY = "evaluation"
"""Of the report, beside what quantising wrote."""


class Served(Frozen):
    """How a model was served while it was measured.

    Attributes:
        model: folder or hub name.
        quantization: as given to `--quantization`; None where vLLM decided.
        max_model_len: longest sequence, tokens.
        options: further arguments of `vllm.LLM`.
    """

    model: str
    quantization: str | None = None
    max_model_len: int
    options: dict[str, JsonValue] = Field(default_factory=dict)

    @classmethod
    def of(cls, spec: EngineSpec) -> Served:
        """What `spec` serves."""
        return cls(
            model=spec.model,
            quantization=spec.quantization,
            max_model_len=spec.max_model_len,
            options=dict(spec.options),
        )


class Evaluation(Frozen):
    """Everything that was measured of a model, and with what.

    Attributes:
        model: as it was served.
        base: the 16-bit model beside it; None where there was none.
        backend: what computed, such as `vllm 0.32.0`.
        versions: package to version.
        machine: as `hardware.describe_machine` says.
        source: of the text.
        fingerprint: SHA-256 over the text's tokens.
        perplexity: of the model alone, where there is no base.
        quality: perplexity and divergence, where there was one.
        distribution: of the tokens' losses and divergences, which pictures are drawn from.
        by_layer: what each group of layers costs, if that was asked for.
        tasks: scores by lm-eval.
        long_generation: long continuations.
        warnings: a sentence each.
    """

    model: Served
    base: Served | None = None
    backend: str
    versions: dict[str, str] = Field(default_factory=dict)
    machine: str
    source: str = ""
    fingerprint: str = ""
    perplexity: Perplexity | None = None
    quality: Quality | None = None
    distribution: Distribution | None = None
    by_layer: tuple[LayerSensitivity, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    long_generation: LongGeneration | None = None
    warnings: tuple[str, ...] = ()


def write_evaluation(folder: Path, evaluation: Evaluation) -> Path:
    """Puts `evaluation` into the report beside a checkpoint, in one step; returns its path.

    Everything else in the report stays; a checkpoint without one gets a file of its own.

    Args:
        folder: of the checkpoint.
        evaluation: takes the place of a former one.

    Raises:
        CheckpointError: the report that is there cannot be read, or the new one not be written; the
            old one is as it was.
    """
    path = folder / REPORT_FILE
    content = {**_load(path), KEY: json.loads(to_json(evaluation))}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_in_one_step(path, text + "\n")
    return path


def read_evaluation(folder: Path) -> Evaluation | None:
    """What `write_evaluation` wrote; None where nothing was.

    Raises:
        CheckpointError: the report cannot be read, or holds an evaluation of another version.
    """
    path = folder / REPORT_FILE
    found = _load(path).get(KEY)
    if found is None:
        return None
    try:
        return Evaluation.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (KEY, *first["loc"])))
        raise CheckpointError(
            f"{path} holds no evaluation of this version of vllm-quantkit ({key}: {first['msg']}): "
            f"run quantkit eval again."
        ) from error


def _load(path: Path) -> dict[str, Any]:
    """The report as it is; empty where there is none."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): move it away, or quantise the model again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds {type(content).__name__} instead of an object: move it away, or "
            f"quantise the model again."
        )
    return content
