"""`quantkit advise` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.advise.known_models import LLAMA_8B, write_config
from vllm_quantkit.advise.answer import Answer
from vllm_quantkit.cli.app import app


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_config(tmp_path / "Llama-3.1-8B", LLAMA_8B)


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["advise", *words])


H100 = ("--gpu", "H100", "--context", "2048", "--batch", "32")


def test_it_answers_in_sentences_with_commands(model: str) -> None:
    result = run(model, *H100)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Use FP8 weights")
    for expected in ("Why:", "Runner-up:", "Commands:", "quantkit quantize", "vllm serve", "GiB"):
        assert expected in result.stdout
    assert "https://arxiv.org/abs/2411.02355" in result.stdout
    assert "80% of the published figure" in result.stdout


def test_json_is_the_whole_answer_and_nothing_else(model: str) -> None:
    result = run(model, *H100, "--json")
    assert result.exit_code == 0, result.output
    answer = Answer.model_validate_json(result.stdout)
    assert answer.choice is not None
    assert answer.choice.candidate.scheme.name == "fp8"
    assert answer.workload.batch == 32
    assert len(answer.estimates) + len(answer.excluded) + len(answer.unserved) == 24
    assert set(json.loads(result.stdout)) == set(Answer.model_fields)


def test_quiet_keeps_result_and_warnings(model: str) -> None:
    result = run(model, *H100, "--quiet")
    assert result.stdout.startswith("Use FP8 weights")
    assert "measuring" not in result.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--gpu", "H101", "--context", "2048"), "H101"),
        (("--gpu", "H100", "--context", "1"), "--context"),
        (("--gpu", "H100", "--context", "2048", "--batch", "0"), "--batch"),
        (("--gpu", "H100", "--context", "2048", "--goal", "speed"), "--goal"),
        (("--gpu", "H100", "--context", "2048", "--train", "some"), "--train"),
        (("--gpu", "H100", "--context", "2048", "--tp", "3"), "3"),
        (("--gpu", "H100", "--context", "2048", "--measured", "nowhere"), "nowhere"),
        (("--gpu", "H100", "--context", "2048", "--search"), "--budget-gib"),
    ],
)
def test_bad_input_is_one_sentence(model: str, words: tuple[str, ...], sentence: str) -> None:
    result = run(model, *words)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert sentence in result.stderr
    assert "Traceback" not in result.output


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run(str(empty), *H100)
    assert result.exit_code == 1
    assert "config.json" in result.stderr


def test_apple_is_sent_to_llama_cpp(model: str) -> None:
    result = run(model, "--gpu", "M3 Max", "--context", "4096")
    assert result.exit_code == 0
    assert "llama-server -m Llama-3.1-8B-Q4_K_M.gguf -c 4096" in result.stdout


def test_help_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from vllm_quantkit.cli.app import app\n"
        "try: app(['advise', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-kl" in done.stdout
