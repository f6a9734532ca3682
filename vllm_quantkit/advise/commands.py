"""The exact commands that follow from a choice."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from vllm_quantkit.advise.candidates import Candidate
from vllm_quantkit.advise.workload import Workload
from vllm_quantkit.spec import Frozen

TEXT = "text.jsonl"
"""Stands for the user's calibration text."""

INT4_CACHE = {"quantkit": {"kv_cache": {"dtype": "int4"}}}


class Command(Frozen):
    """A line for a shell.

    Attributes:
        words: of the command.
        purpose: what it does, in a few words.
    """

    words: tuple[str, ...]
    purpose: str

    @property
    def line(self) -> str:
        """Quoted for a shell."""
        return shlex.join(self.words)


def commands_for(model: str, candidate: Candidate, workload: Workload) -> tuple[Command, ...]:
    """From the 16-bit model to a measured server.

    Args:
        model: folder or hub name.
        candidate: what was chosen.
        workload: what it is served for.
    """
    if candidate.plain:
        return (serve(model, candidate, workload), _bench(model))
    made = made_of(model, candidate)
    return (
        *_quantize(model, made, candidate),
        *_calibrate_cache(model, made, candidate),
        serve(made, candidate, workload),
        *_measure(model, made, candidate, workload),
    )


def made_of(model: str, candidate: Candidate) -> str:
    """The folder that is served: a new one beside the working directory, or the model itself."""
    label = candidate.scheme.label
    return f"{Path(model).name}-{label}" if label else model


def serve(model: str, candidate: Candidate, workload: Workload) -> Command:
    """`vllm serve` with the scheme, the cache, and the workload's sizes."""
    method = candidate.scheme.method
    if method is None and candidate.cache == "int4":
        method = "quantkit-kv4"
    words = ["vllm", "serve", model]
    words += [] if method is None else ["--quantization", method]
    if candidate.cache == "fp8":
        words += ["--kv-cache-dtype", "fp8"]
    elif candidate.cache == "int4" and method != "quantkit-kv4":
        words += ["--additional-config", json.dumps(INT4_CACHE)]
    words += ["--max-model-len", str(workload.context), "--max-num-seqs", str(workload.batch)]
    if workload.tp > 1:
        words += ["--tensor-parallel-size", str(workload.tp)]
    return Command(words=tuple(words), purpose="serve it")


def serve_as_it_is(model: str, workload: Workload) -> Command:
    """`vllm serve` of a checkpoint that says itself how it is quantised."""
    words = ["vllm", "serve", model, "--quantization", "quantkit"]
    words += ["--max-model-len", str(workload.context), "--max-num-seqs", str(workload.batch)]
    return Command(words=tuple(words), purpose="serve it with vllm-quantkit's kernels")


def llama_cpp(model: str, workload: Workload) -> tuple[Command, ...]:
    """GGUF of about 4.9 bits a weight, and llama.cpp's server; from a checkout of llama.cpp."""
    name = Path(model).name
    whole, small = f"{name}-F16.gguf", f"{name}-Q4_K_M.gguf"
    context = str(workload.context * workload.batch)
    return (
        Command(
            words=("python", "convert_hf_to_gguf.py", model, "--outfile", whole),
            purpose="convert the model's folder, in a checkout of llama.cpp",
        ),
        Command(words=("llama-quantize", whole, small, "Q4_K_M"), purpose="quantise it"),
        Command(
            words=("llama-server", "-m", small, "-c", context, "-np", str(workload.batch)),
            purpose="serve it; -c is for all sequences together",
        ),
    )


def own_fp8(model: str, workload: Workload) -> Command:
    """vLLM's FP8 at load, which serves mixtures of experts."""
    words = ["vllm", "serve", model, "--quantization", "fp8"]
    words += ["--max-model-len", str(workload.context), "--max-num-seqs", str(workload.batch)]
    return Command(words=tuple(words), purpose="vLLM's own FP8")


def check_quantized(model: str) -> Command:
    """What a checkpoint runs on, and what blocks it."""
    return Command(words=("quantkit", "check", model), purpose="which kernels serve it")


def _quantize(model: str, made: str, candidate: Candidate) -> Iterator[Command]:
    scheme = candidate.scheme
    if scheme.quantize is None:
        return
    text = ("--calibration", TEXT)
    words = ("quantkit", "quantize", model, "--scheme", scheme.quantize, *text, "--out", made)
    purpose = "quantise it" if scheme.calibrated else "quantise it; the text is for its report"
    yield Command(words=words, purpose=purpose)


def _calibrate_cache(model: str, made: str, candidate: Candidate) -> Iterator[Command]:
    if candidate.cache != "auto":
        out = f"{made}/kv_cache" if made != model or Path(model).is_dir() else f"{model}-KV"
        words = ("quantkit", "calibrate-kv", model, "--calibration", TEXT, "--out", out)
        yield Command(words=words, purpose="learn what the cached keys and values need")


def _measure(model: str, made: str, candidate: Candidate, workload: Workload) -> Iterator[Command]:
    if made != model:
        limit = () if workload.max_kl is None else ("--max-kl", str(workload.max_kl))
        words = ("quantkit", "eval", made, "--against", model, *limit)
        yield Command(words=words, purpose="measure what it cost")
    yield _bench(made)


def _bench(model: str) -> Command:
    return Command(words=("quantkit", "bench", model), purpose="measure how fast it is")
