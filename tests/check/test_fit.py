"""A model that does not fit is told the smallest changes with which it would."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.check.check_cases import GPTQ, check, sentences, write_config
from vllm_quantkit.check.memory import gib
from vllm_quantkit.hardware import find_device

LARGE = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
"""Llama 3 70B: 141.1 GB in 16 bits, 320 KiB of cache a token."""

GIB = 1 << 30


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("large"), **LARGE)


def test_what_fits_has_the_engines_own_numbers(tmp_path: Path):
    report = check(write_config(tmp_path), gpu="H200")

    memory = report.memory
    assert report.serves
    assert memory.fits
    assert memory.allowed_bytes == int(0.9 * find_device("H200").memory_bytes)
    assert memory.sequences == pytest.approx(memory.cache_tokens / 8192, rel=1e-3)  # whole blocks
    # 4 layers, keys and values, 4 heads of 64, 2 bytes.
    assert report.kv_cache.bytes_per_token == 4 * 2 * 4 * 64 * 2
    assert memory.cache_tokens == memory.cache_bytes // report.kv_cache.bytes_per_token
    taken = memory.weight_bytes + memory.activation_bytes + memory.overhead_bytes
    assert memory.cache_bytes == memory.allowed_bytes - taken


def test_two_gpus_or_fewer_bits(large: Path):
    report = check(large, gpu="H200")

    (blocker,) = report.blockers
    assert blocker.subject == "memory"
    assert "the model does not fit: weights take 131.4 GiB" in blocker.sentence
    assert "but NVIDIA H200 gives an engine 126.0 GiB" in blocker.sentence
    assert "--tensor-parallel-size 2 (on 2 of these GPUs)" in blocker.sentence
    assert "or --quantization quantkit-fp8" in blocker.sentence
    assert report.command == f"vllm serve {large} --tensor-parallel-size 2"


def test_the_smallest_number_of_gpus_may_need_shorter_sequences(large: Path):
    """4 of 40.5 GiB each hold 33 GiB of weights each and some cache, but not 131,072 tokens."""
    report = check(large, gpu="L40S")

    words = shlex.split(report.command)
    assert words[words.index("--tensor-parallel-size") + 1] == "4"
    length = int(words[words.index("--max-model-len") + 1])
    assert 4096 <= length < 131072
    assert length % 256 == 0
    again = check(large, gpu="L40S", tp=4, max_model_len=length)
    assert again.serves, sentences(again)
    assert not check(large, gpu="L40S", tp=4, max_model_len=length + 1024).serves
    assert not check(large, gpu="L40S", tp=2).serves


def test_a_length_that_was_asked_for_is_kept(large: Path):
    report = check(large, gpu="L40S", max_model_len=100_000)

    assert "--tensor-parallel-size 8" in report.command
    assert "--max-model-len 100000" in report.command


def test_shorter_sequences_are_the_smallest_change(large: Path):
    """The weights of 2 x 66 GiB fit into 2 x 72 GiB, and leave little for the cache."""
    report = check(large, gpu="A100-80", tp=2)

    assert report.memory.cache_bytes > 0
    words = report.blockers[0].sentence
    assert "fewer than one sequence of 131072" in words
    assert words.index("--max-model-len") < words.index("--tensor-parallel-size 4")
    length = report.memory.cache_tokens // 256 * 256
    assert report.command.endswith(f"--max-model-len {length}")


def test_a_smaller_cache(large: Path):
    """At 4 bits the weights leave 33 GiB, a whole sequence takes 40 of them in 16 bits."""
    report = check(large, "quantkit-int4", gpu="A100-80", max_model_len=131072)

    assert report.command.endswith("--max-model-len 131072 --kv-cache-dtype fp8")
    assert check(large, "quantkit-int4", gpu="A100-80", kv_cache_dtype="fp8").serves


def test_what_is_quantised_already_is_not_quantised_again(large: Path, tmp_path: Path):
    report = check(write_config(tmp_path, GPTQ, **LARGE), gpu="A10")

    assert report.blockers[0].subject == "memory"
    assert "--quantization" not in report.blockers[0].sentence
    assert "a GPU such as" in report.blockers[0].sentence


def test_a_cache_that_was_asked_for_does_not_fit(tmp_path: Path):
    folder = write_config(tmp_path)

    report = check(folder, gpu="cpu", cpu_cache_space=100_000)

    assert "a KV cache of 100000.0 GiB does not fit beside the model" in sentences(report)
    assert report.command == f"vllm serve {folder}"


def test_ranks_do_not_help_a_cpu(large: Path, monkeypatch):
    """They share its memory."""
    small = find_device("cpu").model_copy(update={"memory_bytes": 16 * GIB})
    monkeypatch.setattr(
        sys.modules["vllm_quantkit.check.preflight"], "find_device", lambda _: small
    )

    report = check(large, gpu="cpu")

    assert "the model does not fit" in sentences(report)
    assert "--tensor-parallel-size" not in sentences(report)
    assert report.command == ""


def test_windows_keep_less(tmp_path: Path):
    """Layers that see 1,024 tokens keep no more of them, so a long sequence fits where it could
    not."""
    gemma = {
        **{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
        **{"sliding_window": 1024, "max_position_embeddings": 131072, "num_hidden_layers": 48},
    }
    whole = write_config(tmp_path / "whole", num_hidden_layers=48, max_position_embeddings=131072)
    mixed = write_config(tmp_path / "mixed", **gemma)
    cache = 8 * GIB  # 48 layers of 1 KiB and 131,072 tokens take 6 GiB whole

    assert check(mixed, cache_bytes=cache // 2).serves
    assert not check(whole, cache_bytes=cache // 2).serves
    assert check(whole, cache_bytes=cache).serves


@pytest.mark.parametrize(
    ("size", "words"),
    [(5 << 20, "5.00 MiB"), (50 << 20, "50.0 MiB"), (GIB, "1.00 GiB"), (-20 * GIB, "-20.0 GiB")],
)
def test_sizes_in_words(size, words):
    assert gib(size) == words
