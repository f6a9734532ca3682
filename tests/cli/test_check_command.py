"""`quantkit check` as a command: what it says, its JSON, its exit status, and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.check.check_cases import write_config
from vllm_quantkit.check import CheckReport
from vllm_quantkit.check.report import SCHEMA
from vllm_quantkit.cli import app

DEMO = "examples/tiny-lm"


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(app, ["check", *arguments])
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def test_the_verdict_comes_first_and_the_command_last():
    arguments = ("--quantization", "quantkit-gptq", "--gpu", "H200", "--tp", "2", "--vllm", "0.32")
    out, aside = run(f"{DEMO}/gptq", *arguments)

    lines = out.strip().splitlines()
    assert lines[0] == (
        "OK: examples/tiny-lm/gptq will be served on NVIDIA H200 x 2 with vLLM 0.32, its linear "
        "layers by vllm-quantkit (--quantization quantkit-gptq)."
    )
    assert lines[-1] == (
        "vllm serve examples/tiny-lm/gptq --quantization quantkit-gptq --tensor-parallel-size 2"
    )
    (row,) = [line for line in lines if line.startswith("model.layers.*.self_attn.qkv_proj")]
    assert row.split("  ")[-1] == "Triton W4A16, tensor cores, 4 bits, group 64"
    assert "512 x 256" in row
    assert "256 x 256" in row  # a rank's
    assert "Without the plugin: yes: vLLM 0.32 serves it with Machete." in lines
    assert "error" not in aside


def test_blocked(tmp_path: Path):
    folder = str(write_config(tmp_path))

    out, _ = run(folder, "--quantization", "quantkit-int4", "--gpu", "T4", "--tp", "3", code=1)

    first, second, third, *rest = out.splitlines()
    assert first.startswith(f"BLOCKED: {folder} will not be served on NVIDIA T4 x 3 with vLLM ")
    assert "needs compute capability 8.0" in second
    assert "it has 16 attention heads. Use 1, 2, 4, 8, 16." in third
    assert not any(line.startswith("vllm serve") for line in rest)


def test_json_is_the_report_and_nothing_else(tmp_path: Path):
    out, aside = run(f"{DEMO}/awq", "--gpu", "cpu", "--json", "--kv-cache-dtype", "fp8")

    report = CheckReport.model_validate_json(out)
    assert report.schema_version == SCHEMA == 1
    assert report.serves
    assert report.served_by == "vllm"
    assert {group.kernel for group in report.groups} == {"vLLM: CPU WNA16"}
    assert report.kv_cache.stored == "in 8-bit floats"
    assert report.command == f"vllm serve {DEMO}/awq --kv-cache-dtype fp8"
    assert aside == ""


def test_json_of_what_is_blocked(tmp_path: Path):
    out, _ = run(str(write_config(tmp_path)), "--gpu", "cpu", "--json", "--tp", "5", code=1)

    content = json.loads(out)
    assert content["serves"] is False
    assert [blocker["subject"] for blocker in content["blockers"]] == ["tensor-parallel"]
    assert content["command"] == ""


def test_no_such_model(tmp_path: Path):
    out, aside = run(str(tmp_path / "nonesuch"), "--gpu", "cpu", code=1)

    assert out == ""
    assert "nonesuch" in aside
    assert aside.startswith("error: ")


def test_variables_of_vllm_count(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")

    out, _ = run(f"{DEMO}/gptq", "--quantization", "quantkit", "--gpu", "cpu", "--json", code=1)

    content = json.loads(out)
    assert content["memory"]["cache_bytes"] == 2 << 30
    assert content["blockers"][0]["subject"] == "batch-invariance"


def test_options_of_the_plugin_go_where_vllm_takes_them():
    config = '{"quantkit": {"group_size": 64, "ignore": [".*down_proj"]}}'

    out, _ = run(
        *(f"{DEMO}/bf16", "--quantization", "quantkit-int4", "--gpu", "L40S", "--json"),
        *("--additional-config", config),
    )

    content = json.loads(out)
    schemes = {group["layers"].split(".")[-1]: group["scheme"] for group in content["groups"]}
    assert schemes["down_proj"] == "16 bits"
    assert schemes["qkv_proj"] == "4 bits, group 64"
    assert content["command"].endswith(f"--additional-config '{config}'")


def test_help_ends_with_an_example():
    out, _ = run("--help")
    assert "quantkit check MODEL --quantization quantkit-int4 --gpu L40S --tp 2" in out


@pytest.mark.parametrize("gpu", ["H200", "cpu"])
def test_vllm_and_triton_are_never_imported(gpu):
    code = (
        "import sys; from vllm_quantkit.cli import app\n"
        f"sys.argv = ['quantkit', 'check', '{DEMO}/gptq', '--gpu', '{gpu}', "
        "'--quantization', 'quantkit']\n"
        "try: app()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print({'vllm', 'triton'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "set()"
