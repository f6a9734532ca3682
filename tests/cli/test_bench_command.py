"""`quantkit bench` as a command: what it prints, writes and returns."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.bench.bench_fakes import FakeEngine, Starter, refusing
from vllm_quantkit.bench import commands
from vllm_quantkit.bench.offline import OfflineBench
from vllm_quantkit.cli import app

DEMO = "examples/tiny-lm/bf16"
AWQ = "examples/tiny-lm/awq"
OPTIONS = ("--batches", "1,2", "--tokens", "4", "--prompts", "64", "--load", "1", "--mixed", "2")


@pytest.fixture
def starter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Starter:
    """Engines that a test may change, by the folder they serve."""
    found = Starter({DEMO: lambda: FakeEngine(100.0), AWQ: lambda: FakeEngine(250.0)})

    def bench(*args: object) -> OfflineBench:
        return OfflineBench(*args, start=found)  # type: ignore[arg-type]

    monkeypatch.setattr(commands, "OfflineBench", bench)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return found


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(app, ["bench", DEMO, *OPTIONS, *arguments])
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def test_schemes_stand_beside_each_other(starter):
    out, aside = run("--schemes", f"16-bit,awq={AWQ}")
    assert "decode, batch of 1, tokens/s" in out
    assert "250.0 (2.50x)" in out
    assert "as fast as 16-bit" in out
    assert "2 engines run at the same time and take turns" in aside


def test_json_is_all_there_is(starter):
    out, aside = run("--schemes", f"16-bit,awq={AWQ}", "--json")
    content = json.loads(out)
    assert content["base"] == "16-bit"
    assert content["conclusive"] is True
    assert [row["label"] for row in content["rows"]] == ["16-bit", "awq"]
    served = content["rows"][1]["served"]
    assert served["quantization"] == "quantkit"
    assert served["max_num_seqs"] == 2
    assert served["max_model_len"] == 64 + 8 + 2 * 4
    assert "timing" not in aside


def test_options_reach_the_engine(starter):
    out, _ = run("--json", "--enforce-eager", "--max-model-len", "200", "--schemes", "16-bit+kv4")
    assert json.loads(out)["rows"][0]["served"] == {
        "model": DEMO,
        "quantization": "quantkit-kv4",
        "max_model_len": 200,
        "max_num_seqs": 2,
        "enforce_eager": True,
        "additional_config": {"quantkit": {"kv_cache": {"dtype": "int4"}}},
    }


def test_noise_is_said_and_strict_makes_it_a_failure(starter):
    starter.make[AWQ] = lambda: FakeEngine(100.0, wobble=lambda n: 1.0 + 0.4 * (n % 3))
    out, aside = run("--schemes", f"16-bit,awq={AWQ}", "--json")
    assert json.loads(out)["conclusive"] is False
    assert "too noisy to conclude: the spread is" in aside
    run("--schemes", f"16-bit,awq={AWQ}", "--strict", code=1)


def test_a_scheme_that_fails_is_a_sentence_and_the_others_go_on(starter):
    starter.make[AWQ] = refusing
    out, _ = run("--schemes", f"16-bit,awq={AWQ}")
    assert "awq failed: it stopped" in out
    assert "100.0" in out
    run("--schemes", f"awq={AWQ}", code=1)


def test_one_at_a_time_says_what_it_costs(starter):
    _, aside = run("--schemes", f"16-bit,awq={AWQ}", "--one-at-a-time", "--rounds", "5")
    assert len(starter.started) == 10
    assert "intervals become wider" in aside


def test_files_are_written_once(starter, tmp_path: Path):
    folder = tmp_path / "out"
    run("--out", str(folder))
    assert (folder / "bench.md").read_text().startswith("# Speeds")
    starter.started.clear()
    _, aside = run("--out", str(folder), code=1)
    assert "exists: give a new folder" in aside
    assert not starter.started


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--schemes", "int9"), "'int9' is no scheme: give 16-bit"),
        (("--schemes", "quantkit-awq"), "serves checkpoints that are already quantised"),
        (("--schemes", "x=nowhere/at/all"), "nowhere"),
        (("--server", "nowhere"), "is no address"),
        (("--additional-config", "{"), "is not JSON"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(starter, arguments, sentence):
    _, aside = run(*arguments, code=1)
    assert sentence in aside
    assert len(aside.strip().splitlines()) == 1
    assert not starter.started


def test_an_interrupt_ends_the_command(starter):
    def interrupted() -> FakeEngine:
        raise KeyboardInterrupt

    starter.make[AWQ] = interrupted
    run("--schemes", f"16-bit,awq={AWQ}", code=130)
    assert [engine.closed for _, engine in starter.started] == [True]


def test_help_has_an_example():
    done = CliRunner().invoke(app, ["bench", "--help"])
    assert done.exit_code == 0
    assert "quantkit bench MODEL --schemes 16-bit,quantkit-fp8" in done.output
