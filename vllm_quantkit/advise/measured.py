"""What has been measured of a model's quantised checkpoints, from the reports beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_quantkit.advise.candidates import SCHEMES, CacheName, Candidate, SchemeName
from vllm_quantkit.advise.quality import PUBLISHED_CACHES, QualityRange, published
from vllm_quantkit.errors import CheckpointError, ConfigError, QuantkitError
from vllm_quantkit.footprint import ModelFacts
from vllm_quantkit.reporting.evaluation import REPORT_FILE, Evaluation, Served, read_evaluation
from vllm_quantkit.schemes.registry import get_method
from vllm_quantkit.spec import Frozen, SchemeSpec

SAME = ("hidden_size", "num_hidden_layers", "vocab_size")
"""Of config.json: what models have in common that one was made from the other."""


class Measured(Frozen):
    """A checkpoint whose distance from the 16-bit model was measured.

    Attributes:
        folder: of the checkpoint.
        scheme: the one advised under that name; None for mixtures, and other numerics.
        cache: of the measurement.
        bits: fewest of any layer's weights.
        samples: that it was calibrated on; None where no text was needed, or nothing says.
        divergence, low, high: mean KL from the 16-bit model in nats, and its 95 % interval where
            one is known.
        words: what was measured on.
    """

    folder: str
    scheme: SchemeName | None
    cache: CacheName = "auto"
    bits: int
    samples: int | None = None
    divergence: float
    low: float
    high: float
    words: str

    @property
    def quality(self) -> QualityRange:
        """As a range."""
        words = f"measured: {self.words}"
        source = f"{self.folder}/{REPORT_FILE}"
        return QualityRange(
            low=self.low, high=self.high, basis="measured", words=words, sources=(source,)
        )


class _Quality(BaseModel):
    """Of what `quantkit quantize` wrote."""

    model_config = ConfigDict(extra="ignore")
    tokens: int
    divergence_mean: float


class _Calibration(BaseModel):
    model_config = ConfigDict(extra="ignore")
    samples: int
    source: str = ""


class _Report(BaseModel):
    """The parts of a report that are used here; an evaluation may stand in the same file."""

    model_config = ConfigDict(extra="ignore")
    quality: _Quality | None = None
    calibration: _Calibration | None = None


def quality_of(candidate: Candidate, measured: Iterable[Measured]) -> QualityRange:
    """What was measured of the candidate, else of its scheme, else what is published."""
    for found in measured:
        if (found.scheme, found.cache) == (candidate.scheme.name, candidate.cache):
            return found.quality
    for found in measured:
        if (found.scheme, found.cache) == (candidate.scheme.name, "auto"):
            return found.quality.plus(PUBLISHED_CACHES[candidate.cache])
    return published(candidate)


def read_measured(model: str, facts: ModelFacts, folders: Iterable[Path]) -> tuple[Measured, ...]:
    """What the reports in `folders` say, then those in and beside the model's own folder.

    Raises:
        CheckpointError: a report cannot be read.
        ConfigError: a folder of `folders` has no measurement, or is of another model.
    """
    given = list(folders)
    found = [_given(folder, facts) for folder in given]
    for folder in _beside(Path(model)):
        if folder not in given and _same_model(_config(folder), facts):
            measured = _read(folder)
            found += [] if measured is None else [measured]
    return tuple(found)


def _given(folder: Path, facts: ModelFacts) -> Measured:
    if not _same_model(_config(folder), facts):
        raise ConfigError(
            f"--measured {folder}: this is no checkpoint of {facts.model}, because "
            f"{', '.join(SAME)} of its config.json differ. Give folders made from that model."
        )
    measured = _read(folder)
    if measured is None:
        raise ConfigError(
            f"--measured {folder}: nothing was measured of it. Run `quantkit eval {folder} "
            f"--against {facts.model}` first."
        )
    return measured


def _beside(model: Path) -> Iterator[Path]:
    """The model's folder and its neighbours, as far as they have reports."""
    if model.is_dir():
        for folder in (model, *sorted(model.resolve().parent.iterdir())):
            if (folder / REPORT_FILE).is_file() and (folder / "config.json").is_file():
                yield folder


def _read(folder: Path) -> Measured | None:
    evaluation, report = read_evaluation(folder), _report(folder / REPORT_FILE)
    found = _divergence(evaluation, report)
    if found is None:
        return None
    config = _config(folder)
    specs = _specs(config)
    served = None if evaluation is None else evaluation.model
    value, low, high, words = found
    return Measured(
        folder=str(folder),
        scheme=_scheme(config, specs, served),
        cache=_cache(served),
        bits=min((spec.weight.bits for spec in specs), default=16),
        samples=None if report.calibration is None else report.calibration.samples,
        divergence=value,
        low=low,
        high=high,
        words=words,
    )


def _divergence(
    evaluation: Evaluation | None, report: _Report
) -> tuple[float, float, float, str] | None:
    """Mean, interval and what on: of `quantkit eval`, else of `quantkit quantize`."""
    if evaluation is not None and evaluation.quality is not None:
        quality, kl = evaluation.quality, evaluation.quality.divergence
        words = f"{quality.tokens:,} tokens of {quality.source}, {quality.backend}"
        return kl.value, max(0.0, kl.low), kl.high, words
    if report.quality is not None:
        value = report.quality.divergence_mean
        words = f"{report.quality.tokens:,} held-out tokens when it was quantised"
        return value, value, value, words
    return None


def _report(path: Path) -> _Report:
    if not path.is_file():
        return _Report()
    try:
        return _Report.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): move it away, or measure again."
        ) from error


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__} instead of an object.")
    return config


def _same_model(config: Mapping[str, Any], facts: ModelFacts) -> bool:
    text = config.get("text_config", config)
    sizes = (facts.hidden_size, facts.num_layers, facts.vocab_size)
    return isinstance(text, dict) and tuple(text.get(key) for key in SAME) == sizes


def _specs(config: Mapping[str, Any]) -> tuple[SchemeSpec, ...]:
    """Schemes of a checkpoint's layers; none for 16 bits and what quantkit does not read."""
    stored = config.get("quantization_config")
    if not isinstance(stored, dict):
        return ()
    try:
        return get_method("quantkit").rules(stored).schemes
    except QuantkitError:
        # The checkpoint is another tool's: its numerics are not known, its measurement stands.
        return ()


def _scheme(
    config: Mapping[str, Any], specs: tuple[SchemeSpec, ...], served: Served | None
) -> SchemeName | None:
    if not isinstance(config.get("quantization_config"), dict):
        method = None if served is None else served.quantization
        served_as = (one for one in SCHEMES if _loads(one.at_load, one.calibrated, method))
        return next((one.name for one in served_as), None)
    return _name(specs[0]) if len(specs) == 1 else None


def _loads(at_load: str | None, calibrated: bool, method: str | None) -> bool:
    """True for the scheme that a 16-bit model is served with."""
    plain = method in (None, "quantkit-kv4")
    if at_load is None or plain:
        return at_load is None and plain
    return at_load == method and (not calibrated or method == "quantkit-smoothquant")


def _name(spec: SchemeSpec) -> SchemeName | None:
    weight = spec.weight
    if weight.code_type == "e4m3" and spec.activation is not None:
        return "fp8-block" if weight.scale_rows > 1 else "fp8"
    if weight.code_type != "int":
        return None
    if weight.bits == 8:
        return "int8" if spec.activation is None else "smoothquant"
    if weight.bits != 4:
        return None
    return "awq" if spec.dialect == "awq" or not weight.symmetric else "gptq"


def _cache(served: Served | None) -> CacheName:
    """The KV cache of a measurement."""
    if served is None:
        return "auto"
    extra = served.options.get("additional_config") or {}
    ours = extra.get("quantkit", {}) if isinstance(extra, dict) else {}
    cache = ours.get("kv_cache", {}) if isinstance(ours, dict) else {}
    word = str(served.options.get("kv_cache_dtype") or "auto")
    four = isinstance(cache, dict) and cache.get("dtype") == "int4"
    if four or word.startswith("int4") or served.quantization == "quantkit-kv4":
        return "int4"
    return "fp8" if word.startswith("fp8") else "auto"
