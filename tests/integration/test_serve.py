"""`vllm serve` over HTTP, and nothing left of it afterwards."""

import os
import time
from pathlib import Path

import pytest

from examples.demo_server import NAME, Server
from tests.integration.engines import ROOT
from vllm_quantkit.bench.commands import bench_servers
from vllm_quantkit.bench.requests import read_request
from vllm_quantkit.bench.results import BenchResult
from vllm_quantkit.terminal import Terminal

pytestmark = pytest.mark.engine


GONE_LIMIT_S = 10


def members(group: int) -> list[str]:
    """Living processes of a process group, as /proc describes them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = file.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, process_group = text.rpartition(")")[2].split()[:3]
        if int(process_group) == group and state != "Z":
            found.append(text)
    return found


def bench(address: str, tokenizer: str) -> BenchResult:
    """What `vllm bench serve` sees of the server, by a handful of requests."""
    request = {
        "model": tokenizer,
        "server": [f"demo={address}"],
        "num_prompts": 4,
        "input_len": 32,
        "output_len": 8,
        "rounds": 1,
    }
    return bench_servers(read_request(request), Terminal(quiet=True))


def assert_measured(result: BenchResult) -> None:
    (row,) = result.rows
    assert row.failure == ""
    assert row.served["model"] == NAME
    found = {entry.quantity: entry.sample.median for entry in row.entries}
    assert len(found) == 9
    assert 0 < found["ttft"] <= found["ttft_tail"]
    assert 0 < found["output"] < found["total"]
    # 4 answers of 8 tokens behind 4 prompts of about 32: tokenizers join some random words anew.
    assert found["total"] / found["output"] == pytest.approx(5.0, rel=0.2)
    assert found["output"] == pytest.approx(8 * found["requests"], rel=0.01)


def test_a_server_answers_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = str(ROOT / "examples" / "tiny-lm" / "gptq")
    told: list[str] = []

    with Server(model, "quantkit-gptq", 512, tmp_path / "serve.log", told.append) as server:
        group = os.getpgid(server._process.pid)
        assert members(group)
        answers = dict(server.ask())
        measured = bench(server.address, model)

    assert len(answers) == 2
    assert all(len(text.split()) > 3 for text in answers.values())
    assert_measured(measured)
    assert "layers run" in (tmp_path / "serve.log").read_text()
    limit = time.monotonic() + GONE_LIMIT_S
    while members(group) and time.monotonic() < limit:
        time.sleep(0.1)
    assert members(group) == []
