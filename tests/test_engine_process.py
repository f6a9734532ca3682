"""Processes behind `Engine`: what is asked, what fails, and that none is left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vllm_quantkit.engine import Engine, EngineError, EngineSpec
from vllm_quantkit.integration.engine_worker.operations import OPERATIONS, find_operation

WORKER = """
import os, subprocess, sys, time
import vllm_quantkit.integration.engine_worker.process as process

RANK = [sys.executable, "-c", "import time; time.sleep(60)"]

def start(spec):
    if spec["model"] == "refused":
        raise ValueError("no such model: give a folder.")
    return subprocess.Popen(RANK)

def echo(engine, text): return {"text": text, "rank": engine.pid, "own": os.getpid()}
def fail(engine): raise ValueError("tokens = 'x': give a number.")
def die(engine): print("out of memory", flush=True); os._exit(3)
def sleep(engine): time.sleep(60); return {}

process.start = start
process.serve({"echo": echo, "fail": fail, "die": die, "sleep": sleep}.__getitem__)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fake_worker.py").write_text(WORKER)
    paths = [str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setattr(Engine, "WORKER", "fake_worker")
    return tmp_path / "engine.log"


def is_running(pid: int) -> bool:
    """True for a process that is there and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_running(pid)


def test_an_error_is_a_sentence_and_the_engine_lives_on(worker: Path) -> None:
    with Engine(EngineSpec("model"), worker) as engine:
        with pytest.raises(EngineError, match=r"tokens = 'x': give a number\. .*engine\.log"):
            engine.ask("fail")
        answer = engine.ask("echo", text="a\nb")
    assert answer["text"] == "a\nb"
    assert wait_until_gone(answer["rank"])
    assert "Traceback" in worker.read_text()


def test_a_refusal_is_a_sentence(worker: Path) -> None:
    with pytest.raises(EngineError, match="no such model: give a folder"):
        Engine(EngineSpec("refused"), worker)


def test_death_quotes_the_log(worker: Path) -> None:
    with (
        pytest.raises(EngineError, match="out of memory"),
        Engine(EngineSpec("model"), worker) as engine,
    ):
        engine.ask("die")


def test_ctrl_c_ends_the_engine_and_its_ranks_at_once(worker: Path) -> None:
    begin, pids = time.monotonic(), {}

    def interrupted() -> None:
        with Engine(EngineSpec("model"), worker) as engine:
            pids.update(engine.ask("echo", text=""))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert wait_until_gone(pids["own"])
    assert wait_until_gone(pids["rank"])
    assert time.monotonic() - begin < 15  # a polite end would wait for the rank's minute


def test_an_engine_that_does_not_start_in_time_is_killed(
    worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(Engine, "WORKER", "sleeper")
    with pytest.raises(EngineError, match="the engine stopped"):
        Engine(EngineSpec("model"), worker, start_seconds=1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_found(name: str) -> None:
    assert callable(find_operation(name))
