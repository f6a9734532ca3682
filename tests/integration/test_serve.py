"""`vllm serve` over HTTP, and nothing left of it afterwards."""

import os
import time
from pathlib import Path

import pytest

from examples.demo_server import Server
from tests.integration.engines import ROOT

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


def test_a_server_answers_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = str(ROOT / "examples" / "tiny-lm" / "gptq")
    told: list[str] = []

    with Server(model, "quantkit-gptq", 512, tmp_path / "serve.log", told.append) as server:
        group = os.getpgid(server._process.pid)
        assert members(group)
        answers = dict(server.ask())

    assert len(answers) == 2
    assert all(len(text.split()) > 3 for text in answers.values())
    assert "layers run" in (tmp_path / "serve.log").read_text()
    limit = time.monotonic() + GONE_LIMIT_S
    while members(group) and time.monotonic() < limit:
        time.sleep(0.1)
    assert members(group) == []
