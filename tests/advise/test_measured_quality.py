"""What reports beside checkpoints say of quality, and when it is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.advise.known_models import TINY, write_config
from vllm_quantkit.advise.candidates import Candidate, scheme_named
from vllm_quantkit.advise.measured import quality_of, read_measured
from vllm_quantkit.advise.quality import published
from vllm_quantkit.errors import CheckpointError, ConfigError
from vllm_quantkit.footprint import ModelFacts, read_model

DEMO = Path(__file__).parents[2] / "examples" / "tiny-lm"
REPORT = "quantkit_report.json"


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return read_model(str(DEMO / "bf16")).facts


def copied(source: Path, out: Path, **evaluation: Any) -> Path:
    """Config and report of a checkpoint, with an evaluation where one is given."""
    out.mkdir(parents=True)
    shutil.copy(source / "config.json", out)
    report = json.loads((DEMO / "awq" / REPORT).read_text())
    if evaluation:
        report["evaluation"] = evaluation
    (out / REPORT).write_text(json.dumps(report))
    return out


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def evaluation(model: str, kl: float, quantization: str | None = None, **options: Any) -> Any:
    """As `quantkit eval` writes it."""
    return {
        "model": {
            "model": model,
            "quantization": quantization,
            "max_model_len": 512,
            "options": options,
        },
        "backend": "vllm 0.32.0",
        "machine": "a machine",
        "quality": {
            "tokens": 1000,
            "perplexity": interval(17.5),
            "backend": "vllm 0.32.0",
            "source": "held_out.txt",
            "windows": 8,
            "length": 128,
            "base_perplexity": interval(17.0),
            "increase": interval(0.03),
            "divergence": interval(kl),
            "divergence_tail": 5 * kl,
            "top1_agreement": interval(0.9),
        },
    }


def test_checkpoints_beside_the_model_are_found(facts: ModelFacts) -> None:
    found = {one.scheme: one for one in read_measured(str(DEMO / "bf16"), facts, ())}
    report = json.loads((DEMO / "awq" / REPORT).read_text())
    assert found["awq"].divergence == report["quality"]["divergence_mean"]
    assert found["awq"].samples == 128
    assert found["awq"].bits == 4
    assert "gptq" in found


def test_a_model_known_by_name_has_only_what_is_given(facts: ModelFacts) -> None:
    assert read_measured("org/Model", facts, ()) == ()
    (found,) = read_measured("org/Model", facts, [DEMO / "awq"])
    assert found.scheme == "awq"


def test_an_evaluation_is_worth_more_than_what_quantising_saw(
    facts: ModelFacts, tmp_path: Path
) -> None:
    folder = copied(DEMO / "awq", tmp_path / "m", **evaluation("m", 0.03))
    (found,) = read_measured("org/Model", facts, [folder])
    assert (found.divergence, found.low, found.high) == pytest.approx((0.03, 0.027, 0.033))


@pytest.mark.parametrize(
    ("quantization", "options", "scheme", "cache"),
    [
        ("quantkit-int4", {}, "int4", "auto"),
        ("quantkit-fp8", {"kv_cache_dtype": "fp8"}, "fp8", "fp8"),
        ("quantkit-smoothquant", {}, "smoothquant", "auto"),
        ("quantkit-kv4", {}, "16-bit", "int4"),
        (None, {"additional_config": {"quantkit": {"kv_cache": {"dtype": "int4"}}}}, "16-bit",
         "int4"),
    ],
)  # fmt: skip
def test_models_quantised_at_load_are_known_by_how_they_were_served(
    facts: ModelFacts,
    tmp_path: Path,
    quantization: str | None,
    options: dict[str, Any],
    scheme: str,
    cache: str,
) -> None:
    served = evaluation("m", 0.02, quantization, **options)
    folder = copied(DEMO / "bf16", tmp_path / "m", **served)
    (found,) = read_measured("org/Model", facts, [folder])
    assert (found.scheme, found.cache) == (scheme, cache)


def test_a_measurement_takes_the_place_of_what_is_published(facts: ModelFacts) -> None:
    measured = read_measured("org/Model", facts, [DEMO / "awq"])
    awq = Candidate(scheme=scheme_named("awq"))
    assert quality_of(awq, measured).basis == "measured"
    with_cache = quality_of(awq.model_copy(update={"cache": "int4"}), measured)
    assert with_cache.basis == "partly measured"  # the cache was not measured
    assert with_cache.low > quality_of(awq, measured).low
    gptq = Candidate(scheme=scheme_named("gptq"))
    assert quality_of(gptq, measured) == published(gptq)


def test_another_model_s_checkpoint_is_refused(tmp_path: Path) -> None:
    other = read_model(write_config(tmp_path / "m", TINY | {"hidden_size": 512})).facts
    with pytest.raises(ConfigError, match="is no checkpoint of"):
        read_measured("org/Model", other, [DEMO / "awq"])


def test_a_folder_without_a_measurement_is_refused(facts: ModelFacts, tmp_path: Path) -> None:
    folder = copied(DEMO / "awq", tmp_path / "m")
    (folder / REPORT).unlink()
    with pytest.raises(ConfigError, match="quantkit eval"):
        read_measured("org/Model", facts, [folder])


@pytest.mark.parametrize("content", ["{", "[]", '{"quality": {"tokens": "many"}}'])
def test_a_broken_report_is_one_sentence(facts: ModelFacts, tmp_path: Path, content: str) -> None:
    folder = copied(DEMO / "awq", tmp_path / "m")
    (folder / REPORT).write_text(content)
    with pytest.raises(CheckpointError):
        read_measured("org/Model", facts, [folder])
