"""Quantisers side by side: quality and wall time at equal numerics and calibration tokens.

    python -m benchmarks.quantizers --rounds 3

Correctness first: every checkpoint is read and measured by `quantizer_quality`, ours and others'.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from benchmarks.quantizer_peers import CACHE, QUANTIZERS, Quantizer, QuantizerError, run
from benchmarks.quantizer_quality import Quality, Reference, make_reference, text_windows
from benchmarks.quantizer_workers.job import Algorithm, Job
from benchmarks.random_model import make_pair
from tests.outliers import outlier_twin
from vllm_quantkit.evaluate.hf_model import load_plain, load_served
from vllm_quantkit.hardware.machine import describe_machine

DEMO = Path("examples/tiny-lm/bf16")
DATA = Path("examples/tiny-lm/data")
RESULT = Path("benchmarks/results/quantizers_cpu.json")
MOST_WINDOWS = 256

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """Numerics that quantisers are compared at.

    Attributes:
        name: as tables call it.
        algorithm: see `Job`.
        models: which models it is for: demo, twin (with outlier channels), random (for speed).
        quantizers: label to options; those that can do it.
        bits: of a weight.
        symmetric: whether integer weights have no zero-point.
    """

    name: str
    algorithm: Algorithm
    models: tuple[str, ...]
    quantizers: Mapping[str, Options]
    bits: int = 4
    symmetric: bool = True


@dataclass
class Result:
    """What one quantiser made of one case."""

    model: str
    case: str
    quantizer: str
    options: Options
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    quality: Quality | None = None
    error: str = ""


BOTH, ALL = ("demo", "twin"), ("demo", "twin", "random")
GPTQ_LAYOUT, AWQ_LAYOUT = {"format": "gptq"}, {"format": "awq"}
BATCH = {"batch_size": 8}
CASES = (
    Case("RTN 4 bits", "rtn", ALL, {"quantkit": {}, "llm-compressor": {}}),
    Case(
        "GPTQ 4 bits",
        "gptq",
        ALL,
        {"quantkit": GPTQ_LAYOUT, "llm-compressor": BATCH, "GPTQModel": BATCH},
    ),
    Case(
        "GPTQ 3 bits",
        "gptq",
        BOTH,
        {"quantkit": GPTQ_LAYOUT, "llm-compressor": BATCH, "GPTQModel": BATCH},
        bits=3,
    ),
    Case(
        "GPTQ 2 bits",
        "gptq",
        BOTH,
        {"quantkit": GPTQ_LAYOUT, "llm-compressor": BATCH, "GPTQModel": BATCH},
        bits=2,
    ),
    Case(
        "RTN 4 bits, zero-points",
        "rtn",
        BOTH,
        {"quantkit": {}, "llm-compressor": {}},
        symmetric=False,
    ),
    # GPTQModel 7.6.0 has AWQ for CUDA alone.
    Case(
        "AWQ 4 bits, zero-points",
        "awq",
        ALL,
        {"quantkit": AWQ_LAYOUT, "llm-compressor": BATCH},
        symmetric=False,
    ),
    Case(
        "SmoothQuant W8A8",
        "smoothquant",
        BOTH,
        {"quantkit": {}, "llm-compressor": {**BATCH, "strength": 0.8}},
    ),
    Case("FP8 W8A8", "fp8", BOTH, {"quantkit": {}, "llm-compressor": {}}),
)


def main() -> int:
    """Measure, print and write; 1 where a quantiser failed."""
    args = _parse_arguments()
    results = list(measure(args))
    print(f"\n{describe_machine()}\n")
    report(results)
    args.json.write_text(json.dumps(_record(results, args.json), indent=2) + "\n")
    return int(any(result.error for result in results))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=ALL, default=list(BOTH))
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--only", nargs="+", default=[one.label for one in QUANTIZERS])
    parser.add_argument("--rounds", type=int, default=1, help="of every quantiser, interleaved")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULT)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> Iterator[Result]:
    """Every chosen case on every chosen model."""
    for model in args.models:
        for case in CASES:
            if model in case.models and case.name in args.cases:
                yield from measure_case(case, model, args)


def measure_case(case: Case, model: str, args: argparse.Namespace) -> list[Result]:
    """Its quantisers in turn, as often as asked; the quality of what the first round wrote."""
    chosen = [one for one in QUANTIZERS if one.label in case.quantizers and one.label in args.only]
    results = [Result(model, case.name, one.label, case.quantizers[one.label]) for one in chosen]
    for _ in range(args.rounds):
        for quantizer, result in zip(chosen, results, strict=True):
            if not result.error:
                _measure_once(quantizer, case, result, args.threads)
                print(_line(result), flush=True)
    return results


def _measure_once(quantizer: Quantizer, case: Case, result: Result, threads: int) -> None:
    """Adds a round to `result`, or why there is none."""
    out = CACHE / "out" / f"{result.model}-{case.name}-{quantizer.label}".replace(" ", "_")
    job = Job(
        model=str(model_folder(result.model).resolve()),
        out=str(out.resolve()),
        calibration=str(calibration_file().resolve()),
        algorithm=case.algorithm,
        bits=case.bits,
        symmetric=case.symmetric,
        options=dict(result.options),
    )
    try:
        answer = run(quantizer, job, threads=threads)
        if result.quality is None and result.model != "random":
            result.quality = reference(result.model).compare(load_served(out))
    except (QuantizerError, ValueError) as error:
        result.error = str(error)
        return
    finally:
        shutil.rmtree(out, ignore_errors=True)
    result.seconds.append(answer.seconds)
    result.processor_seconds.append(answer.processor_seconds)


@cache
def model_folder(model: str) -> Path:
    """The folder of a model, made if it is missing."""
    if model == "demo":
        return DEMO
    if model == "random":
        return make_pair(_random_config(), CACHE / "random")[0]
    twin = CACHE / "twin"
    return twin if twin.exists() else outlier_twin(DEMO, twin)


def _random_config() -> LlamaConfig:
    """46 M parameters in linear layers; the demo model's vocabulary."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=2048,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


@cache
def calibration_file() -> Path:
    """int64 [S, 512] as `input_ids`: the calibration text in windows."""
    path = CACHE / "calibration.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        windows = text_windows(DEMO, (DATA / "calibration.txt").read_text())[:MOST_WINDOWS]
        save_file({"input_ids": windows.contiguous()}, path)
    return path


@cache
def reference(model: str) -> Reference:
    """The 16-bit model's predictions of the held-out text.

    Raises:
        ValueError: its perplexity is not the one that transformers' own loss gives.
    """
    plain = load_plain(model_folder(model))
    found = make_reference(plain, text_windows(DEMO, (DATA / "held_out.txt").read_text()))
    with torch.no_grad():
        losses = [plain(row[None], labels=row[None]).loss for row in found.windows]
    expected = math.exp(float(torch.stack(losses).mean()))
    if not math.isclose(found.perplexity, expected, rel_tol=1e-5):
        raise ValueError(f"perplexity of {model} is {found.perplexity}, not {expected}")
    print(f"{model}: 16-bit perplexity {found.perplexity:.4f}", flush=True)
    return found


def report(results: Sequence[Result]) -> None:
    """A Markdown table, and how our time and divergence compare with the others'."""
    print("| model | scheme | quantiser | perplexity | KL, nats | seconds |")
    print("|---|---|---|---|---|---|")
    for result in results:
        print(f"| {result.model} | {result.case} | {result.quantizer} | {_cells(result)} |")
    ours = {(r.model, r.case): r for r in results if r.quantizer == "quantkit" and r.seconds}
    for other in results:
        own = ours.get((other.model, other.case))
        if own is not None and own is not other and other.seconds:
            print(_ratios(own, other))


def _ratios(own: Result, other: Result) -> str:
    time = median(own.seconds) / median(other.seconds)
    line = f"{own.model}, {own.case}: {time:.2f}x the time of {other.quantizer}"
    if own.quality is None or other.quality is None:
        return line
    return f"{line}, {own.quality.divergence / other.quality.divergence:.2f}x its divergence"


def _cells(result: Result) -> str:
    if result.error:
        return f"failed | | {result.error.splitlines()[-1]}"
    seconds = f"{median(result.seconds):.1f}"
    if result.quality is None:
        return f"| | {seconds}"
    quality = result.quality
    return f"{quality.increase:+.2%} | {quality.divergence:.5f} | {seconds}"


def _line(result: Result) -> str:
    return f"{result.model}, {result.case}, {result.quantizer}: {_cells(result)}"


def _record(results: Sequence[Result], path: Path) -> dict[str, Any]:
    """What was measured, and what the file holds of other cases."""
    rows = [asdict(result) for result in results]
    measured = {(row["model"], row["case"], row["quantizer"]) for row in rows}
    if path.exists():
        kept = json.loads(path.read_text())["results"]
        rows += [r for r in kept if (r["model"], r["case"], r["quantizer"]) not in measured]
    return {
        "machine": describe_machine(),
        "quantizers": {one.label: one.packages for one in QUANTIZERS},
        "calibration_windows": list(load_file(calibration_file())["input_ids"].shape),
        "results": sorted(rows, key=lambda row: (row["model"], row["case"], row["quantizer"])),
    }


if __name__ == "__main__":
    sys.exit(main())
