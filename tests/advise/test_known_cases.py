"""What is advised where the answer is known: each case with the reason that decides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.advise.known_models import AWQ_8B, LLAMA_8B, LLAMA_70B, MIXTRAL, TINY, write_config
from vllm_quantkit.advise.advising import Question, advise
from vllm_quantkit.advise.answer import Answer
from vllm_quantkit.advise.workload import Workload
from vllm_quantkit.footprint import read_model
from vllm_quantkit.hardware import Device, find_device

CPU = Device(
    name="two cores of a Zen 4",
    kind="cpu",
    memory_bytes=24 << 30,
    bandwidth=20e9,
    peaks={"bf16": 0.4e12, "int8": 0.8e12},
    measured=("bandwidth", "bf16", "int8"),
    source="this machine",
)
"""Figures as `hardware.measure` finds them where the README's tables were made."""


class Case(NamedTuple):
    """A question with a known answer, and why it is that."""

    name: str
    config: dict[str, Any]
    device: str
    workload: dict[str, Any]
    scheme: str | None
    rule: str | None
    why: str


CASES = [
    Case("8b-h200", LLAMA_8B, "H200", {"context": 2048, "batch": 32}, "fp8", None,
         "prompts run at twice the rate, weights are half, and benchmarks see no loss"),
    Case("8b-h100", LLAMA_8B, "H100", {"context": 2048, "batch": 32}, "fp8", None,
         "as on an H200: 4 bits would be as fast, and lose more"),
    Case("8b-l40s", LLAMA_8B, "L40S", {"context": 2048, "batch": 32}, "fp8", None,
         "Ada multiplies FP8"),
    Case("8b-a10", LLAMA_8B, "A10", {"context": 2048, "batch": 32}, "awq", None,
         "no FP8, little bandwidth: a mid-tier GPU, where W4A16 is the best for serving"),
    Case("8b-a10-128", LLAMA_8B, "A10", {"context": 2048, "batch": 128}, "smoothquant", None,
         "with 128 sequences products decide, and INT8's are twice as fast as bf16's"),
    Case("8b-a100", LLAMA_8B, "A100 80GB", {"context": 2048, "batch": 128}, "smoothquant", None,
         "no FP8, fast memory: INT8 products decide"),
    Case("8b-3090", LLAMA_8B, "RTX 3090", {"context": 2048, "batch": 1}, "awq", None,
         "one sequence reads weights, and 4 bits are the fewest"),
    Case("8b-4090-1", LLAMA_8B, "RTX 4090", {"context": 2048, "batch": 1}, "awq", None,
         "as above: 16-bit weights alone take 15 of 24 GiB"),
    Case("8b-h100-latency", LLAMA_8B, "H100", {"context": 2048, "batch": 1, "goal": "latency"},
         "awq", None, "one sequence reads weights, and 4 bits are the fewest"),
    Case("8b-h100-quality", LLAMA_8B, "H100", {"context": 2048, "batch": 8, "goal": "quality"},
         "16-bit", "best-quality", "everything fits in 16 bits"),
    Case("8b-h100-memory", LLAMA_8B, "H100", {"context": 8192, "batch": 32, "goal": "memory"},
         "awq", None, "4 bits are the fewest; of those, calibrated ones lose least"),
    Case("8b-h100-kl", LLAMA_8B, "H100", {"context": 2048, "batch": 32, "max_kl": 0.001}, "int8",
         None, "only INT8 weights are likely that close, and the cache stays above INT4"),
    Case("8b-4090-quality", LLAMA_8B, "RTX 4090", {"context": 8192, "batch": 8, "goal": "quality"},
         "16-bit", None, "16-bit weights fit beside the cache of one sequence at least"),
    Case("70b-h100", LLAMA_70B, "H100", {"context": 8192, "batch": 32}, "awq", None,
         "8 bits leave room for 4 sequences, 4 bits for the whole batch"),
    Case("70b-4xh100", LLAMA_70B, "H100", {"context": 8192, "batch": 32, "tp": 4}, "fp8", None,
         "there is room for 8 bits on four GPUs"),
    Case("70b-l40s", LLAMA_70B, "L40S", {"context": 8192, "batch": 1}, "awq", None,
         "only 4 bits fit 48 GiB"),
    Case("70b-a10", LLAMA_70B, "A10", {"context": 8192, "batch": 1}, None, "nothing-fits",
         "35 GB of 4-bit weights do not fit 24 GiB"),
    Case("8b-m3", LLAMA_8B, "M3 Max", {"context": 8192, "batch": 1}, None, "apple-silicon",
         "vllm-quantkit has no kernels for Apple's GPUs"),
    Case("8b-t4", LLAMA_8B, "T4", {"context": 2048, "batch": 1}, None, "old-gpu",
         "compute capability 7.5"),
    Case("8b-v100", LLAMA_8B, "V100", {"context": 2048, "batch": 1}, None, "old-gpu",
         "compute capability 7.0"),
    Case("mixtral", MIXTRAL, "H100", {"context": 2048, "batch": 1}, None, "mixture-of-experts",
         "experts are vLLM's own"),
    Case("awq", AWQ_8B, "H100", {"context": 2048, "batch": 1}, None, "quantised-already",
         "it is quantised"),
    Case("train", LLAMA_8B, "H100", {"context": 2048, "batch": 1, "training": "full"}, None,
         "full-fine-tuning", "rounded weights have no gradient"),
    Case("tiny-h100", TINY, "H100", {"context": 1024, "batch": 8}, "16-bit", "fixed-costs",
         "7 MB of weights are read in 3 microseconds"),
    Case("8b-cpu-1", LLAMA_8B, "", {"context": 2048, "batch": 1}, "awq", None,
         "one sequence reads weights, and 4 bits are the fewest"),
    Case("8b-cpu-32", LLAMA_8B, "", {"context": 2048, "batch": 32}, "smoothquant", None,
         "products decide, and a CPU's INT8 ones are twice as fast"),
]  # fmt: skip


def ask(case: Case, folder: Path) -> Answer:
    model = read_model(write_config(folder / "Model", case.config))
    device = find_device(case.device) if case.device else CPU
    return advise(Question(model, device, Workload(**case.workload)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_advice_is_what_is_known(case: Case, tmp_path: Path) -> None:
    answer = ask(case, tmp_path)
    chosen = None if answer.choice is None else answer.choice.candidate.scheme.name
    assert (chosen, answer.rule) == (case.scheme, case.rule), case.why
    assert answer.headline
    if chosen is not None:
        assert answer.reasons
        assert answer.commands


def test_long_contexts_need_a_small_cache(tmp_path: Path) -> None:
    """32 sequences of 32k tokens: 128 KiB a token are 128 GiB of cache beside 8 of weights."""
    case = Case("", LLAMA_8B, "H100", {"context": 32768, "batch": 32}, None, None, "")
    answer = ask(case, tmp_path)
    assert answer.choice is not None
    assert answer.choice.candidate.cache == "int4"
    assert "int4-cache" in [saying.rule for saying in answer.warnings]


def test_a_gpu_without_memory_for_all_says_how_many_run(tmp_path: Path) -> None:
    case = Case("", LLAMA_70B, "L40S", {"context": 8192, "batch": 4}, None, None, "")
    answer = ask(case, tmp_path)
    assert answer.choice is not None
    assert 1 <= answer.choice.sequences < 4
    assert "not-all-at-once" in [saying.rule for saying in answer.warnings]


def test_excluded_candidates_say_why(tmp_path: Path) -> None:
    answer = ask(CASES[3], tmp_path)
    reasons = {one.candidate: one.reasons for one in answer.excluded}
    assert [one.rule for one in reasons["fp8"]] == ["fp8-without-hardware"]
