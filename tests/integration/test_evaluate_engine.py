"""Logits of every position, out of the real engine: complete, in order, and compared right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.integration.engines import ENVIRONMENT, ROOT, EngineFailed, EngineHost
from tests.integration.reference import MEAN_TOLERANCE
from vllm_quantkit import cli
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.evaluate.quality import (
    Windows,
    compare_windows,
    measure_base,
    measure_quality,
)
from vllm_quantkit.evaluate.scorers import engine_spec
from vllm_quantkit.evaluate.window_scores import STORED, WindowScores
from vllm_quantkit.reporting.evaluation import read_evaluation

pytestmark = pytest.mark.engine

DEMO = ROOT / "examples" / "tiny-lm"
WINDOWS, LENGTH = 8, 160

SAME = 1e-5
"""Nats: vLLM and the listener each take a float32 log-softmax of the same logits."""

BACKENDS = 0.02
"""Relative, of a mean KL of 0.02 nats: both compute in float32, and the order of sums moves each
log-probability by some 1e-6, less than the errors of rounding to 4 bits by four orders."""

OPTIONS = {
    name: value
    for name, value in engine_spec(EngineSpec(""), LENGTH).options
    if name != "enforce_eager"
}


@pytest.fixture(scope="module")
def windows() -> Windows:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "bf16")
    text = (DEMO / "data/held_out.txt").read_text()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = LENGTH - 1
    rows = (tuple([0, *ids[step * i : step * i + step]]) for i in range(WINDOWS))
    return Windows(tuple(rows), "held_out.txt")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def base(engines: EngineHost, windows: Windows, kept: Path) -> list[dict[str, list[float]]]:
    """The 16-bit model's figures, its log-probabilities kept; then what vLLM itself gives."""
    keep = [
        {"op": "score_window", "tokens": list(row), "keep": str(kept / str(index))}
        for index, row in enumerate(windows.rows)
    ]
    score = {"op": "score", "prompts": [list(row) for row in windows.rows]}
    options = {**OPTIONS, "max_num_batched_tokens": 64}
    found = engines.run(DEMO / "bf16", None, [*keep, score], max_model_len=LENGTH + 1, **options)
    return found.answers


def test_every_position_is_heard_in_chunks_too(base, windows: Windows) -> None:
    """A window of 160 tokens takes three steps of 64."""
    for answer, expected in zip(base[:WINDOWS], base[WINDOWS], strict=True):
        assert answer["losses"] == pytest.approx([-x for x in expected], abs=SAME)


def test_what_is_kept_is_transformers_distribution(base, windows: Windows, kept: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "bf16", dtype=torch.float32).eval()
    for index in (0, WINDOWS - 1):
        with torch.no_grad():
            logits = model(torch.tensor([windows.rows[index]])).logits[0, :-1]
        expected = logits.log_softmax(-1).numpy()
        found = np.fromfile(kept / str(index), STORED).reshape(expected.shape)
        assert np.abs(found - expected).mean() < MEAN_TOLERANCE
        assert not list(kept.glob("*.partial"))


def test_the_engines_divergence_is_transformers_own(
    base, windows: Windows, kept: Path, engines: EngineHost, tmp_path: Path
) -> None:
    """And its perplexity the one that the engine gives without listening."""
    ask = [
        {"op": "score_window", "tokens": list(row), "base": str(kept / str(index))}
        for index, row in enumerate(windows.rows)
    ]
    score = {"op": "score", "prompts": [list(row) for row in windows.rows]}
    answers = engines.run(
        DEMO / "awq", "quantkit-awq", [*ask, score], max_model_len=LENGTH + 1, **OPTIONS
    ).answers
    scores = [WindowScores.from_json(answer) for answer in answers[:-1]]
    engine = compare_windows(scores, windows, "engine")
    losses = np.concatenate([-np.array(row) for row in answers[-1]])
    assert engine.perplexity.value == pytest.approx(float(np.exp(losses.mean())), rel=SAME)

    stored = measure_base(EngineSpec(str(DEMO / "bf16")), windows, tmp_path / "base", backend="hf")
    twin = measure_quality(EngineSpec(str(DEMO / "awq")), stored, backend="hf")
    assert engine.divergence.value == pytest.approx(twin.divergence.value, rel=BACKENDS)
    assert engine.increase.value == pytest.approx(twin.increase.value, abs=1e-3)
    assert engine.top1_agreement.value == pytest.approx(twin.top1_agreement.value, abs=0.01)


def test_a_base_that_does_not_fit_is_one_sentence(
    engines: EngineHost, windows: Windows, tmp_path: Path
) -> None:
    """It is told when the prompt is done, not out of the middle of vLLM."""
    broken = tmp_path / "broken"
    broken.write_bytes(b"\0" * 16)
    tokens = list(windows.rows[0])
    asks = [{"op": "score_window", "tokens": tokens, "base": str(broken)}]
    with pytest.raises(EngineFailed, match="has 16 bytes, but 2,048 log-probabilities for each"):
        engines.run(DEMO / "bf16", None, asks, max_model_len=LENGTH + 1, **OPTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with its checkpoint, base and text, to write reports into."""
    out = tmp_path_factory.mktemp("command")
    for name in ("awq", "bf16", "data"):
        shutil.copytree(DEMO / name, out / name)
    return out


def test_the_command_measures_keeps_and_judges(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real engines: the demo model's AWQ costs it 1.7 % in perplexity, so 1 % fails."""
    for name, value in {**ENVIRONMENT, "QUANTKIT_CACHE": str(folder / "cache")}.items():
        monkeypatch.setenv(name, value)
    words = ["--quantization", "quantkit-awq", "--max-kl", "0.05", "--max-ppl-increase", "1%"]
    result = CliRunner().invoke(cli.app, ["eval", str(folder / "awq"), *words, "--json"])
    assert result.exit_code == 1, result.output
    assert "perplexity increase is 1.7" in result.stderr
    assert "at most 1.00% is allowed" in result.stderr
    found = read_evaluation(folder / "awq")
    assert found is not None
    assert found.quality is not None
    shown = json.loads(result.stdout)["quality"]
    assert shown["divergence"]["value"] == found.quality.divergence.value
    assert found.quality.divergence.value == pytest.approx(0.019, rel=0.05)
    assert found.quality.windows == 12
    assert (folder / "awq/quantkit_report/report.html").is_file()
    report = json.loads((folder / "awq/quantkit_report.json").read_text())
    assert report["layers"], "what quantising wrote is still there"
