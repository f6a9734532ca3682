"""What quantising a model did and what it cost: quantkit_report.json."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from pydantic import Field, JsonValue, ValidationError

from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.one_step import write_in_one_step
from vllm_quantkit.quantize.calibration import CalibrationOptions, TokenSets
from vllm_quantkit.quantize.observation.stability import UNSTABLE, is_unstable
from vllm_quantkit.quantize.output.records import BlockRecord, LayerRecord
from vllm_quantkit.spec import Frozen
from vllm_quantkit.terminal import to_json

REPORT_FILE = "quantkit_report.json"

WORST_LAYERS = 10
"""Layers in the summary: the ones to look at first."""

PACKAGES = ("vllm-quantkit", "torch", "transformers", "compressed-tensors")


class Quality(Frozen):
    """The quantised model beside the 16-bit one, on held-out tokens.

    Attributes:
        tokens: predicted by both.
        perplexity_before: exp(mean -log p) in 16 bits.
        perplexity_after: the same, quantised.
        divergence_mean: mean over tokens of KL(p || q), nats.
        divergence_tail: its 99th percentile.
        top1_agreement: share of tokens for which both find the same one most likely.
    """

    tokens: int
    perplexity_before: float
    perplexity_after: float
    divergence_mean: float
    divergence_tail: float
    top1_agreement: float


class CalibrationSummary(Frozen):
    """What was calibrated on; the fingerprints are `TokenSet.fingerprint`.

    Attributes:
        source: file or data set.
        samples, tokens, fingerprint: of the calibration set.
        length: tokens in a sample, at most.
        packing: see `CalibrationOptions`.
        seed: of the choice of documents.
        held_out_samples, held_out_tokens, held_out_fingerprint: of the held-out set.
        warnings: a sentence each.
    """

    source: str
    samples: int
    tokens: int
    length: int
    packing: str
    seed: int
    fingerprint: str
    held_out_samples: int
    held_out_tokens: int
    held_out_fingerprint: str
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: CalibrationOptions, sets: TokenSets) -> CalibrationSummary:
        """The summary of what `options` gave."""
        return cls(
            source=sets.calibration.source,
            samples=sets.calibration.samples,
            tokens=sets.calibration.tokens,
            length=sets.calibration.input_ids.shape[1],
            packing=options.packing,
            seed=options.seed,
            fingerprint=sets.calibration.fingerprint,
            held_out_samples=sets.held_out.samples,
            held_out_tokens=sets.held_out.tokens,
            held_out_fingerprint=sets.held_out.fingerprint,
            warnings=sets.warnings,
        )


class Resources(Frozen):
    """What quantising took and what it saved.

    Attributes:
        seconds: by phase.
        host_bytes: the process's largest resident memory.
        device_bytes: the most memory taken on the device; None on CPU.
        bytes_before, bytes_after: of the weight files.
        parameters: of the whole model.
    """

    seconds: dict[str, float]
    host_bytes: int
    device_bytes: int | None = None
    bytes_before: int
    bytes_after: int
    parameters: int = Field(gt=0)

    @property
    def bits_per_weight(self) -> float:
        """8 bytes_after / parameters: scales, and what stayed in 16 bits, included."""
        return 8 * self.bytes_after / self.parameters


class Report(Frozen):
    """Everything worth knowing about a quantised model.

    Attributes:
        model: the source, as the user named it.
        base_model: its name on the hub; None where that is not known.
        scheme: numerics to the number of layers that have them.
        layers: in the order they run.
        unstable: layers whose disagreement is beyond `stability.UNSTABLE`, to that disagreement.
        coverage: expert lists to the calibration tokens that were sent to each expert.
        quality: None where it was not measured.
        not_measured: why not; empty where it was.
        calibration: None where none was needed.
        resources: what it took.
        bits_per_weight: of the whole model.
        versions: packages, `python` and `device`.
        evaluation: what `reporting.write_evaluation` put there since, kept as it is.
    """

    model: str
    base_model: str | None = None
    scheme: dict[str, int]
    layers: tuple[LayerRecord, ...]
    unstable: dict[str, float] = Field(default_factory=dict)
    coverage: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    quality: Quality | None = None
    not_measured: str = ""
    calibration: CalibrationSummary | None = None
    resources: Resources
    bits_per_weight: float
    versions: dict[str, str] = Field(default_factory=dict)
    evaluation: dict[str, JsonValue] | None = None

    @property
    def notes(self) -> dict[str, str]:
        """Layers that were not quantised as planned, to why."""
        return {layer.name: layer.note for layer in self.layers if layer.note}


def build_report(
    model: str,
    blocks: Iterable[BlockRecord],
    resources: Resources,
    *,
    device: torch.device,
    quality: Quality | None = None,
    not_measured: str = "no held-out text was given",
    calibration: CalibrationSummary | None = None,
    base_model: str | None = None,
) -> Report:
    """The report of a finished run.

    Args:
        model: the source, as the user named it.
        blocks: in order.
        resources: what the run took.
        device: that it ran on.
        quality: as measured; None where it was not.
        not_measured: why it was not.
        calibration: what was calibrated on; None where nothing was.
        base_model: the source's name on the hub.
    """
    blocks = list(blocks)
    layers = tuple(layer for block in blocks for layer in block.layers)
    schemes = [layer.scheme for layer in layers]
    return Report(
        model=model,
        base_model=base_model,
        scheme={scheme: schemes.count(scheme) for scheme in dict.fromkeys(schemes)},
        layers=layers,
        unstable={x.name: x.disagreement or 0.0 for x in layers if is_unstable(x.disagreement)},
        coverage={name: counts for block in blocks for name, counts in block.coverage.items()},
        quality=quality,
        not_measured="" if quality else not_measured,
        calibration=calibration,
        resources=resources,
        bits_per_weight=resources.bits_per_weight,
        versions=versions(device),
    )


def versions(device: torch.device) -> dict[str, str]:
    """What a run may depend on: packages, Python, and the device by name."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return packages | {"python": platform.python_version(), "device": f"{device.type} ({name})"}


def peak_host_bytes() -> int:
    """The process's largest resident memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, other systems KiB.
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """The most memory PyTorch has taken on a CUDA device; None on others."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def render_report(report: Report) -> str:
    """JSON, sorted and indented."""
    return to_json(report, sort_keys=True)


def write_report(report: Report, path: Path) -> None:
    """`render_report` in a file that appears in one step."""
    write_in_one_step(path, render_report(report))


def read_report(path: Path) -> Report:
    """What `write_report` wrote.

    Raises:
        CheckpointError: the file is something else.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path} is no report of this version of vllm-quantkit ({key}: {first['msg']}): "
            f"quantise the model again."
        ) from error


def render_lines(report: Report, worst: int = WORST_LAYERS) -> Iterator[str]:
    """The report in a few lines, the worst layers first.

    Args:
        report: to render.
        worst: layers to name.
    """
    size = report.resources
    for scheme, count in report.scheme.items():
        yield f"{count} layers: {scheme}"
    yield (
        f"weights: {size.bytes_before:,} -> {size.bytes_after:,} bytes, "
        f"{report.bits_per_weight:.2f} bits per weight"
    )
    yield from _quality_lines(report)
    if report.calibration is not None:
        yield f"calibration: {describe_calibration(report.calibration)}"
        yield from (f"warning: {warning}" for warning in report.calibration.warnings)
    yield from _layer_lines(report, worst)


def describe_calibration(summary: CalibrationSummary) -> str:
    """Source and size in a line."""
    return (
        f"{summary.samples} {summary.packing} samples of at most {summary.length} tokens "
        f"({summary.tokens:,} tokens) of {summary.source}, seed {summary.seed}"
    )


def _quality_lines(report: Report) -> Iterator[str]:
    quality = report.quality
    if quality is None:
        yield f"held-out quality: not measured, because {report.not_measured}"
        return
    change = quality.perplexity_after / quality.perplexity_before - 1
    yield (
        f"held-out perplexity over {quality.tokens:,} tokens: {quality.perplexity_before:.3f} -> "
        f"{quality.perplexity_after:.3f} ({change:+.2%})"
    )
    yield (
        f"KL divergence: mean {quality.divergence_mean:.4g}, 99th percentile "
        f"{quality.divergence_tail:.4g}; same first choice {quality.top1_agreement:.1%}"
    )


def _layer_lines(report: Report, worst: int) -> Iterator[str]:
    """The layers with the largest errors; then how many are unstable, and those with a note."""
    layers = sorted(report.layers, key=lambda layer: _badness(layer.error), reverse=True)[:worst]
    width = max((len(layer.name) for layer in layers), default=0)
    for layer in layers:
        kind = "weight" if layer.output_error is None else "output"
        yield f"{layer.name:<{width}}  {kind} error {layer.error:.2%}  {layer.method}"
    if report.unstable:
        name = max(report.unstable, key=report.unstable.__getitem__)
        yield (
            f"unstable: in {len(report.unstable)} of {len(report.layers)} layers the halves of the "
            f"calibration set give scales more than {math.expm1(UNSTABLE):.0%} apart, most in "
            f"{name} ({math.expm1(min(report.unstable[name], 50.0)):.0%}): give more samples"
        )
    for name, note in list(report.notes.items())[:worst]:
        yield f"note: {name}: {note}"
    if len(report.notes) > worst:
        yield f"note: {len(report.notes) - worst} more layers have notes in {REPORT_FILE}"


def _badness(error: float) -> float:
    """NaN counts as the worst."""
    return math.inf if math.isnan(error) else error
