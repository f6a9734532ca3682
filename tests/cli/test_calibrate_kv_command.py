"""The command `quantkit calibrate-kv` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vllm_quantkit import cli
from vllm_quantkit.cli.running import INTERRUPTED
from vllm_quantkit.kv_calibration import read_kv_calibration
from vllm_quantkit.quantize import commands

DEMO = Path(__file__).parents[2] / "examples/tiny-lm"
FEW = ["--samples", "8", "--length", "64", "--held-out", "2", "--allow-few-samples"]
TEXT = ["--calibration", str(DEMO / "data/calibration.txt"), *FEW]


def command(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["calibrate-kv", str(DEMO / "bf16"), *words])


def test_the_demo_model_is_calibrated(tmp_path: Path) -> None:
    out = tmp_path / "kv"
    result = command("--out", str(out), *TEXT)
    assert result.exit_code == 0, result.output
    for layer in range(4):
        assert f"model.layers.{layer}.self_attn  4 bits" in result.output
    assert "8 calibration samples: with fewer than 256" in result.output
    assert "all 4 layers have a cache of 4 bits" in result.output
    assert "576 bytes for each token, 3.56 times less than the 2,048" in result.output
    assert f'"calibration": "{out}"' in result.output
    found = read_kv_calibration(out)
    assert (found.summary.samples, found.summary.tokens) == (8, 512)
    assert found.summary.held_out_tokens == 128
    assert {layer.dtype for layer in found.layers.values()} == {"int4"}
    assert [path.name for path in tmp_path.iterdir()] == ["kv"]


def test_a_stricter_bound_keeps_layers(tmp_path: Path) -> None:
    result = command("--out", str(tmp_path / "kv"), "--bound", "0.07", *TEXT)
    assert result.exit_code == 0, result.output
    assert "layers keep a cache of 16 bits, because their output error is beyond 7.0%" in (
        result.output
    )
    found = read_kv_calibration(tmp_path / "kv").layers
    assert {layer.dtype for layer in found.values()} == {"int4", "auto"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--bound", "2", *TEXT],
            "--bound 2.0: it bounds a layer's output error",
        ),
        (TEXT[:-1], "give at least 128"),
        (["--calibration", "none.txt"], "none.txt"),
        (["--device", "tpu", *TEXT], "device 'tpu' cannot be used"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words: list[str], message: str, tmp_path: Path) -> None:
    result = command("--out", str(tmp_path / "kv"), *words)
    assert result.exit_code == 1
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    result = command("--out", str(tmp_path), *TEXT)
    assert result.exit_code == 1
    assert "already exists: remove it, or write to another folder" in result.output


def test_ctrl_c_does_not_promise_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "calibrate_kv_cache", interrupt)
    result = command("--out", str(tmp_path / "kv"), *TEXT)
    assert result.exit_code == INTERRUPTED
    assert "interrupted: the same command begins anew" in result.output
    assert not list(tmp_path.iterdir())


def test_the_demo_models_own_calibration_is_up_to_date_with_its_format() -> None:
    found = read_kv_calibration(DEMO / "bf16/kv_cache")
    assert list(found.layers) == [f"model.layers.{index}.self_attn" for index in range(4)]
    assert {layer.dtype for layer in found.layers.values()} == {"int4"}
    assert all(r.calibrated.output < 0.11 for r in found.summary.layers)
    assert "shift+scale" in {record.treatment for record in found.summary.layers}
