"""The commands `quantkit quantize` and `quantkit calibrate` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.tiny_models import create_tiny_model
from vllm_quantkit import cli
from vllm_quantkit.cli.running import INTERRUPTED
from vllm_quantkit.quantize.activation_stats import read_activation_stats
from vllm_quantkit.quantize.job import Job
from vllm_quantkit.quantize.output.report import REPORT_FILE, read_report

SOURCE = Path(__file__).parents[2] / "examples/tiny-lm/data/held_out.txt"
FEW = ["--samples", "8", "--length", "32", "--held-out", "2", "--allow-few-samples"]
TEXT = ["--calibration", str(SOURCE), *FEW]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "llama"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return str(create_tiny_model("llama", folder, **sizes))


def command(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def test_a_scheme_is_enough(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command("quantize", model, "--scheme", "awq", "--out", str(out), *TEXT)
    assert result.exit_code == 0, result.output
    assert "14 layers: 4 bits, group 128" in result.output
    assert "held-out perplexity over 62 tokens" in result.output
    assert "8 calibration samples: with fewer than 256" in result.output
    assert "peak memory" in result.output
    assert f"vllm serve {out}" in result.output
    report = read_report(out / REPORT_FILE)
    assert report.calibration is not None
    assert report.calibration.samples == 8
    assert report.resources.host_bytes > 1 << 26


def test_options_reach_the_recipe(model: str, tmp_path: Path) -> None:
    words = "--scheme gptq --bits 3 --group-size 32 --asym --act-order group --format quantkit"
    ignored = ["--ignore", r"re:.*\.o_proj", "--ignore", "model.layers.0.mlp.down_proj"]
    out = tmp_path / "out"
    result = command("quantize", model, "--out", str(out), *words.split(), *ignored, *TEXT)
    assert result.exit_code == 0, result.output
    report = read_report(out / REPORT_FILE)
    assert report.scheme == {"3 bits, group 32": 11}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "quantkit"


def test_the_command_line_goes_over_the_recipe(model: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
scheme: gptq
bits: 3
layers:
  - match: re:.*down_proj
    scheme: int8
calibration: {{source: {SOURCE}, samples: 8, length: 32, held_out: 2, allow_few_samples: true}}
"""
    )
    out = tmp_path / "out"
    words = ["--recipe", str(recipe), "--bits", "4", "--samples", "6", "--out", str(out)]
    result = command("quantize", model, *words)
    assert result.exit_code == 0, result.output
    report = read_report(out / REPORT_FILE)
    assert report.scheme == {"4 bits, group 128": 12, "8 bits, per channel": 2}
    assert report.calibration is not None
    assert report.calibration.samples == 6


def test_a_dry_run_writes_nothing(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--scheme", "awq", "--dry-run", "--out", str(out), *TEXT]
    result = command("quantize", model, *words)
    assert result.exit_code == 0, result.output
    assert not list(tmp_path.iterdir())
    assert "14 layers: 4 bits, group 128 (awq + mse)" in result.output
    assert "time: about" in result.output
    assert "one block" in result.output
    written = command("quantize", model, "--scheme", "awq", "--out", str(out), *TEXT)
    sizes = [line for line in result.output.splitlines() if line.startswith("weights:")]
    assert sizes[0] in written.output, "the sizes are what is written"


def test_first_and_last_block_can_come_first(model: str, tmp_path: Path) -> None:
    words = ["--scheme", "rtn", "--layers", "0,last", "--out", str(tmp_path / "out"), *TEXT]
    assert command("quantize", model, *words).exit_code == 0
    words = ["--scheme", "rtn", "--layers", "0,7", "--out", str(tmp_path / "other"), *TEXT]
    result = command("quantize", model, *words)
    assert result.exit_code == 1
    assert "'7' is no block of this model; give numbers from 0 to 1, or 'last'" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scheme", "awq"], "pass --out FOLDER"),
        (["--out", "x"], "no scheme was chosen"),
        (["--scheme", "wrong", "--out", "x"], "scheme 'wrong' is unknown; choose rtn"),
        (["--scheme", "fp8", "--bits", "4", "--out", "x"], "bits 4 does not apply"),
        (["--scheme", "awq", "--out", "x", *TEXT[:-1]], "at least 128"),
        (["--scheme", "awq", "--out", "x", "--calibration", "none.txt"], "none.txt"),
        (["--scheme", "rtn", "--out", "x", "--device", "tpu"], "device 'tpu' cannot be used"),
        (["--scheme", "rtn", "--out", "x", "--hidden-states", "tape"], "hidden_states = 'tape'"),
        (["--recipe", "none.yaml", "--out", "x"], "the recipe none.yaml cannot be read"),
        (
            ["--scheme", "rtn", "--out", "x", "--ignore", "re:[a"],
            "'re:[a' is no regular expression",
        ),
        (["--scheme", "rtn", "--out", "."], "already exists"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], message: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("quantize", model, *words)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = command("quantize", "no/such-model", "--scheme", "rtn", "--out", str(tmp_path / "x"))
    assert result.exit_code == 1
    assert "'no/such-model' is neither a folder nor a model that the hub gave" in result.output


def test_ctrl_c_says_how_to_go_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "quantize", interrupt)
    result = command("quantize", model, "--scheme", "rtn", "--out", str(tmp_path / "x"))
    assert result.exit_code == INTERRUPTED
    assert "--resume" in result.output


def test_calibrate_writes_what_smoothing_reads(model: str, tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    result = command("calibrate", model, "--out", str(out), *TEXT[:-3], "--allow-few-samples")
    assert result.exit_code == 0, result.output
    assert "14 layers, 256 tokens" in result.output
    stats = read_activation_stats(out)
    assert stats["model.layers.1.mlp.down_proj"].shape == (256,)
    assert all(bool((value > 0).any()) for value in stats.values())
    assert torch.equal(
        stats["model.layers.0.self_attn.q_proj"], stats["model.layers.0.self_attn.k_proj"]
    )
    again = command("calibrate", model, "--out", str(out), *TEXT[:-3], "--allow-few-samples")
    assert again.exit_code == 1
    assert "already exists" in again.output


def test_a_program_reads_the_report(model: str, tmp_path: Path) -> None:
    words = ["quantize", model, "--scheme", "rtn", "--json"]
    planned = CliRunner().invoke(cli.app, [*words, "--dry-run"])
    assert json.loads(planned.stdout)["schemes"] == {"4 bits, group 128 (nearest)": 14}
    out = tmp_path / "out"
    made = CliRunner().invoke(cli.app, [*words, "--out", str(out)])
    assert json.loads(made.stdout)["scheme"] == {"4 bits, group 128": 14}
    assert made.stderr == ""
