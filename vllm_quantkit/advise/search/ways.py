"""Ways to quantise a layer that a search chooses between, and what each costs layer by layer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_quantkit.advise.request import SearchRequest
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import CheckpointError, ConfigError
from vllm_quantkit.evaluate.by_layer import measure_by_layer
from vllm_quantkit.evaluate.sensitivity import LayerSensitivity, SensitivityMethod
from vllm_quantkit.evaluate.text import TextOptions, fresh_windows
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.quantize.job import UNLIMITED, Job
from vllm_quantkit.quantize.progress import Silent
from vllm_quantkit.quantize.recipes.presets import LayerOptions
from vllm_quantkit.reporting.evaluation import REPORT_FILE, read_evaluation
from vllm_quantkit.schemes.registry import get_method
from vllm_quantkit.spec import Frozen, SchemeSpec
from vllm_quantkit.terminal import Terminal

DATA_FREE: tuple[tuple[str, LayerOptions], ...] = (
    ("fp8", LayerOptions(scheme="fp8")),
    ("int8", LayerOptions(scheme="int8")),
    ("4 bits", LayerOptions(scheme="mse", bits=4)),
    ("3 bits", LayerOptions(scheme="mse", bits=3)),
)
"""What is measured on the spot: none of them needs calibration, so each takes one short run."""

EXACT_BELOW = 1_000_000_000
"""Parameters up to which each group is measured by passes of its own; beyond, the approximation
takes a handful of passes for all of them."""


class Way(Frozen):
    """One way to quantise any layer.

    Attributes:
        name: for people.
        options: of the recipe that quantises so.
        sensitivities: what each group of layers costs, quantised so.
        origin: where that was measured.
    """

    name: str
    options: LayerOptions
    sensitivities: tuple[LayerSensitivity, ...]
    origin: str

    def losses(self) -> dict[str, float]:
        """Each layer's name to its group's KL divergence, shared evenly; at least 0.

        Noise and errors that undo each other make some measurements negative, which no search
        should seek.
        """
        found: dict[str, float] = {}
        for row in self.sensitivities:
            if not row.is_block:
                share = max(0.0, row.kl) / len(row.members)
                found |= dict.fromkeys(row.members, share)
        return found


def measure_ways(
    folder: Path, request: SearchRequest, parameters: int, terminal: Terminal
) -> tuple[Way, ...]:
    """Quantises the model in each way into a temporary folder, and measures every group of layers.

    Args:
        folder: of the 16-bit model.
        request: names the text.
        parameters: of the model; says whether groups are measured one by one.
        terminal: is told how far it is.

    Raises:
        QuantkitError: the text cannot be read or is too short, or the model cannot be quantised.
    """
    windows = _windows(folder, request)
    method: SensitivityMethod = (
        "exact quantise" if parameters < EXACT_BELOW else "fisher approximation"
    )
    ways = []
    with tempfile.TemporaryDirectory(prefix="quantkit-search-") as scratch:
        for name, options in DATA_FREE:
            terminal.note(f"{name}: quantising the model and measuring its layers ...")
            made = Path(scratch) / options.model_dump_json(exclude_none=True).translate(PLAIN)
            _quantize(folder, options, made)
            rows = measure_by_layer(
                EngineSpec(str(made)), EngineSpec(str(folder)), windows, method, terminal=terminal
            )
            origin = f"{method}, {len(windows.rows)} windows of {windows.source}"
            ways.append(Way(name=name, options=options, sensitivities=rows, origin=origin))
    return tuple(ways)


PLAIN = str.maketrans('{}":,', "-----")
"""What has no place in a folder's name."""


def read_ways(folders: Iterable[Path]) -> tuple[Way, ...]:
    """A way for each checkpoint whose layers were measured.

    Raises:
        ConfigError: a checkpoint's layers were not measured, or it is a mixture itself.
        CheckpointError: a report cannot be read.
    """
    return tuple(_read_way(folder) for folder in folders)


def _read_way(folder: Path) -> Way:
    evaluation = read_evaluation(folder)
    if evaluation is None or not evaluation.by_layer:
        raise ConfigError(
            f"{folder}: its layers were not measured. Run `quantkit eval {folder} --by-layer "
            "quantise`, or give a text to measure on with --measure-sensitivity."
        )
    spec = _only_spec(folder)
    options = _options(spec, _method(folder))
    return Way(
        name=f"{options.scheme}, {spec.weight.describe()}",
        options=options,
        sensitivities=evaluation.by_layer,
        origin=f"{folder}/{REPORT_FILE}",
    )


def _only_spec(folder: Path) -> SchemeSpec:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json cannot be read ({error}).") from error
    stored = config.get("quantization_config")
    specs = get_method("quantkit").rules(stored).schemes if isinstance(stored, dict) else ()
    if len(specs) != 1:
        raise ConfigError(
            f"{folder} has {len(specs)} schemes, but a search needs checkpoints of one each: "
            "quantise the whole model in one way."
        )
    return specs[0]


def _method(folder: Path) -> set[str]:
    """How its layers were quantised, by the report: parts such as `awq` and `mse`."""
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        methods = [str(layer["method"]) for layer in report.get("layers", ())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/{REPORT_FILE} cannot be read ({error}).") from error
    if not methods:
        raise ConfigError(
            f"{folder} was not made by `quantkit quantize`, so that no recipe is known that would "
            "make such layers: quantise the model with it, or measure with --measure-sensitivity."
        )
    return set(max(methods, key=len).split(" + "))


def _options(spec: SchemeSpec, method: set[str]) -> LayerOptions:
    """What to ask of the quantiser for such layers."""
    weight = spec.weight
    if weight.code_type != "int":
        return LayerOptions(scheme="fp8-block" if weight.scale_rows > 1 else "fp8")
    integers: dict[str, Any] = {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "symmetric": weight.symmetric,
    }
    return LayerOptions(scheme=_scheme(spec, method), **integers)


def _scheme(spec: SchemeSpec, method: set[str]) -> str:
    gptq = "+gptq" if "gptq" in method else ""
    if spec.activation is not None:
        return f"smoothquant{gptq}"
    if "awq" in method:
        return f"awq{gptq}"
    if gptq:
        return "gptq"
    if spec.weight.bits == 8 and spec.weight.group_size == -1:
        return "int8"
    return "mse" if "mse" in method else "rtn"


def _windows(folder: Path, request: SearchRequest) -> Windows:
    if request.text is None:
        raise ConfigError("no text to measure layers on: give --measure-sensitivity FILE.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = Job.prepare(str(folder), {"scheme": "none"}, {}, {}).max_length()
    options = TextOptions(source=str(request.text), windows=request.windows, length=request.length)
    return fresh_windows(tokenizer, min(longest, UNLIMITED), options)


def _quantize(folder: Path, options: LayerOptions, out: Path) -> None:
    keys = options.model_dump(exclude_none=True)
    recipe = {**keys, "format": "quantkit"}
    Job.prepare(str(folder), recipe, {}, {}).quantize(out, None, Silent())
