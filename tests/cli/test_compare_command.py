"""The command `quantkit compare` as a user types it; engines are pretended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.compare.fakes import FakeWorkbench
from vllm_quantkit import cli
from vllm_quantkit.cli.running import INTERRUPTED
from vllm_quantkit.compare import commands
from vllm_quantkit.compare.notes import QUICK

DEMO = Path(__file__).parents[2] / "examples/tiny-lm"
TWO = ("--rows", "fp8,awq")

Pretend = Callable[[FakeWorkbench], FakeWorkbench]


def command(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["compare", *words])


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    def use(bench: FakeWorkbench) -> FakeWorkbench:
        monkeypatch.setattr(commands, "RealWorkbench", lambda **_: bench)
        return bench

    return use


def test_a_table_and_its_files(pretend: Pretend, tmp_path: Path) -> None:
    pretend(FakeWorkbench())
    result = command(str(DEMO / "bf16"), *TWO, "--out", "out")
    assert result.exit_code == 0, result.output
    assert "INT4 AWQ" in result.stdout
    assert "2.50x" in result.stdout
    assert "Quantised in: seconds" in result.stdout
    assert QUICK not in result.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"table.md", "table.csv", "table.json", "table.svg"}


def test_files_have_a_place_of_their_own(pretend: Pretend, tmp_path: Path) -> None:
    pretend(FakeWorkbench())
    result = command(str(DEMO / "bf16"), *TWO)
    assert "written to quantkit-compare/bf16/table.md" in result.stderr
    assert (tmp_path / "quantkit-compare/bf16/table.csv").is_file()


def test_json_alone(pretend: Pretend) -> None:
    pretend(FakeWorkbench())
    result = command(str(DEMO / "bf16"), *TWO, "--json", "--quick")
    found = json.loads(result.stdout)
    assert [row["name"] for row in found["rows"]] == ["16-bit", "fp8", "awq"]
    assert found["quick"]


def test_quick_is_said(pretend: Pretend) -> None:
    pretend(FakeWorkbench())
    result = command(str(DEMO / "bf16"), *TWO, "--quick", "--quiet")
    assert QUICK in result.stdout
    assert "checkpoint ..." not in result.stderr


def test_what_is_left_out_is_not_measured(pretend: Pretend) -> None:
    bench = pretend(FakeWorkbench())
    result = command(str(DEMO / "bf16"), *TWO, "--no-quality")
    assert "Quality was not measured." in result.stdout
    assert not any(call.startswith("quality") for call in bench.calls)


def test_a_failed_row_is_shown_and_fails_the_command(pretend: Pretend) -> None:
    pretend(FakeWorkbench(failing={"serve awq": "group size 128 does not fit."}))
    result = command(str(DEMO / "bf16"), *TWO)
    assert result.exit_code == 1
    assert "INT4 AWQ" in result.stdout
    assert "INT4 AWQ, checkpoint: group size 128 does not fit." in result.stderr


def test_ctrl_c_says_that_the_same_command_goes_on(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    bench = pretend(FakeWorkbench())
    with monkeypatch.context() as patch:
        patch.setattr(bench, "speeds", interrupt)
        result = command(str(DEMO / "bf16"), *TWO)
    assert result.exit_code == INTERRUPTED
    assert "goes on where this one stopped" in result.stderr
    bench.calls.clear()
    assert command(str(DEMO / "bf16"), *TWO).exit_code == 0
    assert {call.split()[0] for call in bench.calls} == {"serve", "speeds"}


def test_fresh_forgets(pretend: Pretend) -> None:
    bench = pretend(FakeWorkbench())
    command(str(DEMO / "bf16"), *TWO)
    bench.calls.clear()
    command(str(DEMO / "bf16"), *TWO, "--fresh")
    assert bench.calls["quality awq"] == 1


def test_what_cannot_be_done_at_all_is_said_before_anything_is_made(pretend: Pretend) -> None:
    bench = pretend(FakeWorkbench(failing={"check": "vLLM is not installed."}))
    result = command(str(DEMO / "bf16"), *TWO)
    assert result.exit_code == 1
    assert "vLLM is not installed." in result.stderr
    assert not bench.calls


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "awk"], "there is no row 'awk': did you mean awq?"),
        (["--windows", "1"], "--windows 1: Input should be greater than or equal to 2"),
        (["--window-length", "3"], "--window-length 3"),
        (["--batches", "one"], "--batches 'one': must be numbers"),
        (["--rounds", "0"], "--rounds 0"),
        (["--samples", "4"], "at least 128"),
        (["--text", "none.txt", "--quick"], "none.txt"),
        (["--calibration", "none.txt"], "none.txt"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], message: str, tmp_path: Path) -> None:
    result = command(str(DEMO / "bf16"), *words)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "quantkit-compare").exists()


def test_a_quantised_model_is_no_base() -> None:
    result = command(str(DEMO / "awq"))
    assert result.exit_code == 1
    assert "is quantised already (quant_method 'awq'): give its 16-bit model" in result.stderr


def test_no_such_model() -> None:
    result = command("no/such-model")
    assert result.exit_code == 1
    assert "'no/such-model' is neither a folder nor a model that the hub gave" in result.stderr
