"""The command `quantkit eval` as a user types it, through transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from vllm_quantkit import cli
from vllm_quantkit.cli.running import INTERRUPTED
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate import command as module
from vllm_quantkit.evaluate import quality
from vllm_quantkit.evaluate.request import read_request
from vllm_quantkit.evaluate.scorers import ModelScorer
from vllm_quantkit.quantize.output.report import read_report
from vllm_quantkit.reporting.evaluation import read_evaluation

DEMO = Path(__file__).parents[2] / "examples/tiny-lm"
TEXT = ["--text", str(DEMO / "data/held_out.txt"), "--windows", "4", "--length", "128"]
HF = ["--backend", "hf"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    shutil.copytree(DEMO / "bf16", tmp_path / "demo" / "bf16")
    return shutil.copytree(DEMO / "awq", tmp_path / "demo" / "awq")


def evaluate(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["eval", *words])


def test_a_checkpoint_is_compared_with_what_it_was_made_of(awq: Path) -> None:
    limits = ["--max-kl", "0.1", "--max-ppl-increase", "20%", "--min-top1", "0.5"]
    result = evaluate(str(awq), *HF, *TEXT, *limits, "--by-layer", "approximate")
    assert result.exit_code == 0, result.output
    for words in ("perplexity, 16 bits", "KL divergence, nats per token", "same most likely token"):
        assert words in result.stdout
    assert "508 tokens of held_out.txt, 4 windows of at most 128; transformers" in result.stdout
    assert "of 16: fisher approximation" in result.stdout
    assert "4 windows are too few to conclude much" in result.stderr
    found = read_evaluation(awq)
    assert found is not None
    assert found.base is not None
    assert Path(found.base.model).name == "bf16"
    assert len(found.by_layer) == 20
    assert read_report(awq / "quantkit_report.json").layers, "what quantising wrote is kept"
    assert (awq / "quantkit_report/report.md").is_file()


def test_wrong_weights_do_not_pass(awq: Path) -> None:
    """Scales that a faulty quantiser made half as large again, in two blocks."""
    path = awq / "model.safetensors"
    tensors = load_file(path)
    for layer in (0, 2):
        tensors[f"model.layers.{layer}.mlp.down_proj.scales"] *= 1.5
        tensors[f"model.layers.{layer}.self_attn.v_proj.scales"] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    result = evaluate(str(awq), *HF, *TEXT, "--max-kl", "0.05", "--max-ppl-increase", "5%")
    assert result.exit_code == 1, result.output
    assert "error: KL divergence is " in result.stderr
    assert "at most 0.05 is allowed" in result.stderr
    assert "error: perplexity increase is " in result.stderr


def test_json_is_all_that_is_printed(awq: Path) -> None:
    result = evaluate(str(awq), *HF, *TEXT, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["quality"]["tokens"] == 508
    assert content["model"]["model"] == str(awq)


def test_a_16_bit_model_is_compared_with_itself_quantised(awq: Path, tmp_path: Path) -> None:
    plain, out = awq.parent / "bf16", tmp_path / "out"
    words = ["--quantization", "quantkit-int8", "--out", str(out)]
    result = evaluate(str(plain), *HF, *TEXT, *words)
    assert result.exit_code == 0, result.output
    found = read_evaluation(out)
    assert found is not None
    assert found.quality is not None
    assert 0 < found.quality.divergence.value < 0.001
    assert not (plain / "quantkit_report.json").exists()


def test_without_a_base_there_is_perplexity_alone(awq: Path) -> None:
    shutil.rmtree(awq.parent / "bf16")
    result = evaluate(str(awq), *HF, *TEXT)
    assert result.exit_code == 0, result.output
    assert "there is no 16-bit model to compare with, only perplexity" in result.stderr
    assert "KL" not in result.stdout
    found = read_evaluation(awq)
    assert found is not None
    assert found.quality is None
    assert found.perplexity is not None
    for words in (["--max-kl", "1"], ["--by-layer", "restore"], ["--long", "16"]):
        result = evaluate(str(awq), *HF, *TEXT, *words)
        assert result.exit_code == 1
        assert "pass --against BASE" in result.stderr
    result = evaluate(str(awq), *HF, *TEXT, "--against", str(DEMO / "bf16"), "--max-kl", "1")
    assert result.exit_code == 0, result.output


def test_ctrl_c_keeps_the_windows_that_are_done(
    awq: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    class Interrupted(ModelScorer):
        def score(self, *args: object, **kwargs: object) -> quality.WindowScores:
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(1)
            return super().score(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr("vllm_quantkit.evaluate.scorers.ModelScorer", Interrupted)
        result = evaluate(str(awq), *HF, *TEXT)
    assert result.exit_code == INTERRUPTED
    assert "goes on where this one stopped" in result.stderr
    assert read_evaluation(awq) is None
    assert len(list(cache.rglob("*.f32"))) == 2
    assert not list(cache.rglob("*.partial"))
    assert evaluate(str(awq), *HF, *TEXT).exit_code == 0
    assert len(list(cache.rglob("*.f32"))) == 4


def test_what_fails_later_loses_nothing(awq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConfigError("the data of gsm8k could not be loaded")

    monkeypatch.setattr(module, "require_lm_eval", lambda: None)
    monkeypatch.setattr(module, "run_tasks", fail)
    result = evaluate(str(awq), *HF, *TEXT, "--tasks", "gsm8k")
    assert result.exit_code == 1
    assert "the data of gsm8k could not be loaded" in result.stderr
    found = read_evaluation(awq)
    assert found is not None
    assert found.quality is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by-layer", "all"], "--by-layer 'all' is unknown; choose one of restore, quantise"),
        (["--additional-config", "{"], "is not JSON"),
        (["--additional-config", "[]"], "must be an object"),
        (["--additional-config", '{"quantkit": {"wrong": 1}}'], "wrong = 1"),
        (["--max-ppl-increase", "little"], "'little' is no fraction"),
        (["--max-task-drop", "0.1"], "--max-task-drop needs --tasks"),
        (["--tasks", ","], "names no task"),
        (["--windows", "1"], "--windows = 1"),
        (["--backend", "onnx"], "--backend = 'onnx'"),
        (["--long-prompts", "x.txt"], "--long-prompts needs --long"),
        (["--backend", "hf", "--tensor-parallel-size", "2"], "are the engine's"),
    ],
)
def test_bad_options_are_one_sentence(words: list[str], message: str) -> None:
    result = evaluate(str(DEMO / "awq"), *words)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_no_such_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = evaluate("no/such-model")
    assert result.exit_code == 1
    assert "'no/such-model' is neither a folder nor a model that the hub gave" in result.stderr


def test_options_reach_both_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    request = read_request(
        {
            "model": "MODEL",
            "quantization": "quantkit-int4",
            "kv_cache_dtype": "fp8",
            "additional_config": '{"quantkit": {"group_size": 64}}',
            "tensor_parallel_size": 2,
            "dtype": "bfloat16",
        }
    )
    assert request.changes_the_model
    model, base = request.spec("MODEL"), request.base_spec("BASE")
    assert model.quantization == "quantkit-int4"
    assert dict(model.options) == {
        "kv_cache_dtype": "fp8",
        "additional_config": {"quantkit": {"group_size": 64}},
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
    }
    assert base.quantization is None
    assert dict(base.options) == {"dtype": "bfloat16", "tensor_parallel_size": 2}


def test_a_cache_of_4_bits_says_how_it_was_measured(
    awq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = read_request(
        {"model": str(awq.parent / "bf16"), "quantization": "quantkit-kv4", "text": TEXT[1]}
    )
    evaluator = module.prepare(request, quality.SILENT)
    assert any("read back from the 4-bit cache" in text for text in evaluator.warnings())
