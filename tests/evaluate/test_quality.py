"""Two models through transformers: figures, the base on disk, and what they are refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import LICENSE
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import CheckpointError, ConfigError, UnsupportedScheme
from vllm_quantkit.evaluate import base_scores, quality
from vllm_quantkit.evaluate.quality import (
    Windows,
    measure_base,
    measure_perplexity,
    measure_quality,
)
from vllm_quantkit.evaluate.scorers import engine_spec, stores_kv_in_4_bits

SUMS = 1e-6
"""Relative: float32 logits of the same model, added up in another order."""


@pytest.fixture(scope="module")
def windows(llama: Path) -> Windows:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer(LICENSE.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    return Windows(tuple(tuple(ids[64 * i : 64 * i + 64]) for i in range(9)), "licence")


def test_perplexity_is_transformers_own(llama: Path, windows: Windows) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        rows = [torch.tensor([row]) for row in windows.rows]
        losses = [float(model(row, labels=row).loss) for row in rows]
    found = measure_perplexity(EngineSpec(str(llama)), windows, backend="hf")
    assert found.perplexity.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=SUMS)
    assert found.tokens == 9 * 63
    assert found.backend.startswith("transformers ")
    assert not found.warnings


def test_a_model_is_no_worse_than_itself(llama: Path, windows: Windows) -> None:
    spec = EngineSpec(str(llama))
    found = measure_quality(spec, measure_base(spec, windows, backend="hf"), backend="hf")
    assert found.divergence.value == 0.0
    assert found.increase.value == pytest.approx(0.0, abs=SUMS)  # the base is stored in float32
    assert found.top1_agreement.value == 1.0


def test_a_quantised_model_is_compared_token_by_token(
    llama: Path, quantised: Path, windows: Windows
) -> None:
    base = measure_base(EngineSpec(str(llama)), windows, backend="hf")
    found = measure_quality(EngineSpec(str(quantised)), base, backend="hf")
    plain = measure_perplexity(EngineSpec(str(llama)), windows, backend="hf").perplexity
    own = measure_perplexity(EngineSpec(str(quantised)), windows, backend="hf").perplexity
    assert found.base_perplexity.value == pytest.approx(plain.value, rel=SUMS)
    assert found.perplexity.value == pytest.approx(own.value, rel=SUMS)
    assert found.increase.value == pytest.approx(own.value / plain.value - 1, rel=1e-4)
    assert 0 < found.divergence.low < found.divergence.value < found.divergence_tail
    assert 0.5 < found.top1_agreement.value < 1


def test_a_model_quantised_at_load_is_compared_with_itself(llama: Path, windows: Windows) -> None:
    base = measure_base(EngineSpec(str(llama)), windows, backend="hf")
    eight, four = (
        measure_quality(EngineSpec(str(llama), method), base, backend="hf").divergence.value
        for method in ("quantkit-int8", "quantkit-int4")
    )
    assert 0 < eight < four / 10


def test_the_base_is_measured_once(
    llama: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = EngineSpec(str(llama))
    first = measure_base(spec, windows, backend="hf")
    assert not first.missing()
    first.path(4).unlink()  # as a run that was killed leaves it
    kept = first.path(3).stat().st_mtime_ns
    again = measure_base(spec, windows, backend="hf")
    assert again.folder == first.folder
    assert not again.missing()
    assert again.path(3).stat().st_mtime_ns == kept
    monkeypatch.setattr(quality, "open_scorer", lambda *_: pytest.fail("nothing is missing"))
    measure_base(spec, windows, backend="hf")


def test_another_model_or_text_has_another_folder(
    llama: Path, windows: Windows, tmp_path: Path
) -> None:
    twin = shutil.copytree(llama, tmp_path / "twin")
    spec, other = EngineSpec(str(llama)), Windows(windows.rows[:4], "licence")
    found = [
        measure_base(EngineSpec(str(twin)), windows, backend="hf").folder,
        measure_base(spec, windows, backend="hf").folder,
        measure_base(spec, other, backend="hf").folder,
    ]
    os.utime(twin / "model.safetensors", (0, 0))
    found.append(measure_base(EngineSpec(str(twin)), windows, backend="hf").folder)
    # A copy keeps headers, sizes and times; only the last three differ from each other.
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_a_folder_with_other_scores_is_refused(
    llama: Path, windows: Windows, tmp_path: Path
) -> None:
    spec = EngineSpec(str(llama))
    measure_base(spec, windows, tmp_path / "base", backend="hf")
    other = Windows(windows.rows[:4], "licence")
    with pytest.raises(CheckpointError, match="of another model, text or version"):
        measure_base(spec, other, tmp_path / "base", backend="hf")


def test_a_small_disk_is_refused_before_anything_is_loaded(
    llama: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(llama)._replace(free=1000)
    monkeypatch.setattr(base_scores.shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(quality, "open_scorer", lambda *_: pytest.fail("the disk is too small"))
    needed = 9 * 63 * 512 * 4
    with pytest.raises(CheckpointError, match=f"take {needed:,} bytes in .*where 1,000 are free"):
        measure_base(EngineSpec(str(llama)), windows, backend="hf")


def test_few_windows_are_warned_of(llama: Path, windows: Windows) -> None:
    few = Windows(windows.rows[:3], "licence")
    found = measure_perplexity(EngineSpec(str(llama)), few, backend="hf")
    assert "3 windows are too few" in found.warnings[0]
    with pytest.raises(ConfigError, match="raise --windows"):
        Windows(windows.rows[:1], "licence")


def test_models_that_cannot_be_told_apart_are_warned_of(llama: Path, windows: Windows) -> None:
    base = measure_base(EngineSpec(str(llama)), windows, backend="hf")
    found = measure_quality(EngineSpec(str(llama), "quantkit-int8"), base, backend="hf")
    assert found.increase.low < 0 < found.increase.high
    assert "cannot be told apart" in found.warnings[0]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (("quantkit-kv4", ()), UnsupportedScheme, "a KV cache of 4 bits exists in the engine"),
        (("quantkit-int8", (("enforce_eager", True),)), ConfigError, "no other option of engines"),
        (("quantkit-int8", (("dtype", "float16"),)), ConfigError, "float32 or bfloat16"),
        (("quantkit-llm-int8", ()), UnsupportedScheme, "measure it in the engine"),
    ],
)
def test_what_transformers_cannot_do_is_refused(
    spec: tuple[str, tuple[tuple[str, object], ...]],
    error: type[Exception],
    message: str,
    llama: Path,
    windows: Windows,
) -> None:
    with pytest.raises(error, match=message):
        measure_perplexity(EngineSpec(str(llama), spec[0], options=spec[1]), windows, backend="hf")


@pytest.mark.parametrize(
    "spec",
    [
        EngineSpec("m", "quantkit-kv4"),
        EngineSpec("m", None, options=(("kv_cache_dtype", "int4_per_token_head"),)),
        EngineSpec(
            "m",
            "quantkit-awq",
            options=(("additional_config", {"quantkit": {"kv_cache": {"dtype": "int4"}}}),),
        ),
    ],
)
def test_a_cache_of_4_bits_is_read_while_measuring(spec: EngineSpec) -> None:
    assert stores_kv_in_4_bits(spec)
    options = dict(engine_spec(spec, 64).options)
    assert options["additional_config"]["quantkit"]["kv_cache"]["prefill"] == "cached"
    json.dumps(options)


def test_other_engines_keep_their_options() -> None:
    found = engine_spec(EngineSpec("m", options=(("enforce_eager", False),)), 64)
    assert found.max_model_len == 65
    assert dict(found.options)["enforce_eager"] is False
    assert dict(found.options)["enable_prefix_caching"] is False
    assert "additional_config" not in dict(found.options)
