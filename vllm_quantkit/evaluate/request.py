"""What a user asks of `quantkit eval`, checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, ValidationError

from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.gates import Gates, read_fraction
from vllm_quantkit.evaluate.scorers import Backend
from vllm_quantkit.evaluate.sensitivity import SensitivityMethod
from vllm_quantkit.evaluate.tasks import TaskPlan
from vllm_quantkit.evaluate.text import TextOptions
from vllm_quantkit.long_generation.plan import LongPlan
from vllm_quantkit.options import read_options
from vllm_quantkit.spec import Frozen

METHODS: dict[str, SensitivityMethod] = {
    "restore": "exact restore",
    "quantise": "exact quantise",
    "approximate": "fisher approximation",
}
"""`--by-layer` to what it stands for."""

FRACTIONS = ("max_ppl_increase", "min_top1")
"""Limits that may be given in per cent."""


class EvaluateRequest(Frozen):
    """Everything that `quantkit eval` is asked for.

    Attributes:
        model: folder or hub name.
        against: the 16-bit model; None looks for it in the model's report.
        quantization, kv_cache_dtype, dtype, tensor_parallel_size: as `vllm serve` takes them.
        additional_config: the same.
        backend: what runs the models.
        text: what they are measured on.
        by_layer: how each layer's share is found; None does not look for it.
        by_layer_windows: of the text, for that.
        tasks: for lm-eval; None runs none.
        long: long generation; None generates nothing.
        long_prompts: file of prompts; None continues windows of the text.
        gates: limits.
        out: folder for report and pictures; None is the checkpoint's.
    """

    model: str
    against: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    dtype: str | None = None
    tensor_parallel_size: int = Field(default=1, ge=1)
    additional_config: dict[str, JsonValue] = Field(default_factory=dict)
    backend: Backend = "vllm"
    text: TextOptions = TextOptions()
    by_layer: SensitivityMethod | None = None
    by_layer_windows: int = Field(default=4, ge=2)
    tasks: TaskPlan | None = None
    long: LongPlan | None = None
    long_prompts: Path | None = None
    gates: Gates = Gates()
    out: Path | None = None

    @property
    def changes_the_model(self) -> bool:
        """True where the engine rounds weights or cache of what is stored in 16 bits."""
        return bool(self.quantization or self.kv_cache_dtype or self.additional_config)

    def spec(self, folder: str) -> EngineSpec:
        """How the model is served; the folder stands for its name."""
        own = {
            "kv_cache_dtype": self.kv_cache_dtype,
            "additional_config": self.additional_config or None,
        }
        return EngineSpec(folder, self.quantization, options=self._options(own))

    def base_spec(self, base: str) -> EngineSpec:
        """The same engine for the 16-bit model, nothing quantised."""
        return EngineSpec(base, None, options=self._options({}))

    def _options(self, own: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        parallel = self.tensor_parallel_size
        options = {
            **own,
            "dtype": self.dtype,
            "tensor_parallel_size": None if parallel == 1 else parallel,
        }
        return tuple((name, value) for name, value in options.items() if value is not None)


def read_request(given: Mapping[str, Any]) -> EvaluateRequest:
    """The command line's options, by their names, as a request.

    Raises:
        ConfigError: names the option, the value and what is allowed.
    """
    fields = {name: given[name] for name in EvaluateRequest.model_fields if name in given}
    fields |= {
        "text": _renamed(given, {"source": "text"}, TextOptions),
        "gates": _limits(given),
        "by_layer": _method(given.get("by_layer")),
        "additional_config": _additional(given.get("additional_config")),
        "tasks": _tasks(given),
        "long": None if given.get("long") is None else {"tokens": given["long"]},
    }
    if given.get("long_prompt_count") is not None and fields["long"] is not None:
        fields["long"] |= {"prompts": given["long_prompt_count"]}
    try:
        request = EvaluateRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][-1]).replace("_", "-")
        raise ConfigError(f"{name} = {first['input']!r}: {first['msg']}.") from error
    _check(request)
    return request


def _check(request: EvaluateRequest) -> None:
    """Refuses options that do not go together.

    Raises:
        ConfigError: says which.
    """
    read_options(request.additional_config)
    if request.backend == "hf" and (request.kv_cache_dtype or request.tensor_parallel_size > 1):
        raise ConfigError(
            "--kv-cache-dtype and --tensor-parallel-size are the engine's: leave them out, or "
            "leave --backend hf out."
        )
    if request.gates.max_task_drop is not None and request.tasks is None:
        raise ConfigError("--max-task-drop needs --tasks.")
    if request.long_prompts is not None and request.long is None:
        raise ConfigError("--long-prompts needs --long TOKENS.")


def _renamed(
    given: Mapping[str, Any], names: Mapping[str, str], model: type[Frozen]
) -> dict[str, Any]:
    """Of the options given, those that are fields of `model`, by their names there."""
    fields = {field: names.get(field, field) for field in model.model_fields}
    return {field: given[name] for field, name in fields.items() if name in given}


def _limits(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: given[name] for name in Gates.model_fields if name in given}
    return {k: read_fraction(v) if k in FRACTIONS else v for k, v in found.items()}


def _method(name: str | None) -> SensitivityMethod | None:
    if name is None:
        return None
    if name not in METHODS:
        raise ConfigError(f"--by-layer {name!r} is unknown; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def _additional(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--additional-config {text!r} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--additional-config {text!r} must be an object of JSON.")
    return content


def _tasks(given: Mapping[str, Any]) -> dict[str, Any] | None:
    if given.get("tasks") is None:
        return None
    names = tuple(name.strip() for name in given["tasks"].split(",") if name.strip())
    if not names:
        raise ConfigError("--tasks names no task: give some such as mmlu,gsm8k.")
    return {
        "names": names,
        "folder": given.get("tasks_path"),
        "limit": given.get("tasks_limit"),
        "fewshot": given.get("tasks_fewshot"),
    }
