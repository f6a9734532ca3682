"""`vllm bench serve`: its command line, what it leaves, and how it fails."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import pytest

from tests.bench.bench_fakes import captured
from vllm_quantkit.bench import serve_command
from vllm_quantkit.bench.commands import run_bench
from vllm_quantkit.bench.quantities import Key
from vllm_quantkit.bench.requests import read_request
from vllm_quantkit.bench.serve_command import Flag, Load, ServeCommand, flags, read_metrics
from vllm_quantkit.bench.servers import Server, parse_servers
from vllm_quantkit.engine import EngineError
from vllm_quantkit.errors import ConfigError

RESULT = {
    "completed": 4,
    "failed": 0,
    "output_throughput": 80.0,
    "total_token_throughput": 400.0,
    "request_throughput": 10.0,
    **{f"{kind}_{name}_ms": 5.0 for kind in ("median", "p99") for name in ("ttft", "tpot", "itl")},
}

PROGRAM = """#!{python}
import json, os, pathlib, sys, time
if "--help=all" in sys.argv:
    print({help!r})
    sys.exit()
options = dict(zip(sys.argv[3:], sys.argv[4:]))
pathlib.Path({notes!r}).open("a").write(json.dumps(sys.argv[3:]) + "\\n")
if "slow" in options["--base-url"]:
    pathlib.Path({notes!r}).with_name("pid").write_text(str(os.getpid()))
    time.sleep(60)
if "broken" in options["--base-url"]:
    print("ModuleNotFoundError: No module named 'pandas'", file=sys.stderr)
    sys.exit(1)
result = json.loads({result!r})
result["output_throughput"] *= 1 + ("fast" in options["--base-url"])
path = pathlib.Path(options["--result-dir"], options["--result-filename"])
path.write_text(json.dumps(result))
"""
ALL_FLAGS = (
    "--backend --base-url --endpoint --model --tokenizer --dataset-name --random-input-len "
    "--random-output-len --num-prompts --request-rate --ignore-eos --percentile-metrics "
    "--metric-percentiles --save-result --result-dir --result-filename --max-concurrency --seed"
)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that behaves as `vllm bench serve` does, and the file of what it was asked."""
    notes = tmp_path / "notes"
    file = tmp_path / "vllm"
    write_program(file, notes, ALL_FLAGS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(serve_command, "_program", lambda: [str(file), "bench", "serve"])
    return notes


def write_program(file: Path, notes: Path, help_text: str) -> None:
    content = PROGRAM.format(
        python=sys.executable, help=help_text, notes=str(notes), result=json.dumps(RESULT)
    )
    file.write_text(content)
    file.chmod(0o755)


class Listing(BaseHTTPRequestHandler):
    """Answers as a server's list of models."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "served-name"}]}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Listing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_have_labels():
    found = parse_servers(["http://h:8000/", "b=https://x/v1"])
    assert found == {"http://h:8000/": "http://h:8000", "b": "https://x"}


@pytest.mark.parametrize("value", ["localhost:8000", "a=localhost", "=http://x", "a=http://"])
def test_what_is_no_address_is_refused(value):
    with pytest.raises(ConfigError, match="is no address: give one such as http://"):
        parse_servers([value])
    with pytest.raises(ConfigError, match="has 'a' twice"):
        parse_servers(["a=http://x", "a=http://y"])


def test_a_server_is_asked_what_it_serves(address):
    assert Server.at(address) == Server(address, "served-name")
    with pytest.raises(ConfigError, match="no OpenAI-compatible server answers at"):
        Server.at("http://127.0.0.1:9")


def test_the_command_line_says_it_all(tmp_path: Path):
    load = Load(concurrency=4, prompts=10, input_tokens=32, output_tokens=8)
    wanted = flags(load, 2.5, "http://h", "served", "folder", tmp_path / "r.json")
    given = {flag.name: flag.value for flag in wanted}
    assert given["--base-url"] == "http://h"
    assert given["--request-rate"] == "2.5"
    assert given["--max-concurrency"] == "4"
    assert (given["--model"], given["--tokenizer"]) == ("served", "folder")
    assert (given["--random-input-len"], given["--random-output-len"]) == ("32", "8")
    assert given["--result-filename"] == "r.json"
    assert given["--ignore-eos"] is None
    at_once = flags(Load(), math.inf, "http://h", "m", "t", tmp_path / "r.json")
    assert {f.value for f in at_once if f.name == "--request-rate"} == {"inf"}
    assert "--max-concurrency" not in {flag.name for flag in at_once}


def test_options_that_a_version_lacks_are_left_out_or_refused(program):
    command = ServeCommand()
    assert command.arguments([Flag(name="--seed", value="1"), Flag(name="--new", needed=False)])[
        3:
    ] == ["--seed", "1"]
    with pytest.raises(ConfigError, match=r"`bench serve` has no --new: use vLLM"):
        command.arguments([Flag(name="--new")])


def test_a_command_that_does_not_run_is_one_sentence(tmp_path, monkeypatch):
    file = tmp_path / "vllm"
    file.write_text("#!/bin/sh\necho 'PackageNotFoundError: vllm' >&2\nexit 1\n")
    file.chmod(0o755)
    monkeypatch.setattr(serve_command, "_program", lambda: [str(file), "bench", "serve"])
    with pytest.raises(ConfigError, match=r"does not run: PackageNotFoundError: vllm\. Install"):
        ServeCommand()


def test_without_vllm_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no program `vllm`"):
        ServeCommand()


def test_results_are_read_in_seconds():
    found = read_metrics(RESULT, 2.0)
    assert found[Key("output", 2.0)] == 80.0
    assert found[Key("total", 2.0)] == 400.0
    assert found[Key("requests", 2.0)] == 10.0
    assert found[Key("ttft", 2.0)] == pytest.approx(0.005)
    assert found[Key("itl_tail", 2.0)] == pytest.approx(0.005)
    assert len(found) == 9


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"failed": 3, "completed": 1}, "3 of 4 requests failed at 2 requests/s"),
        ({"completed": 0}, "0 of 0 requests failed"),
        ({"p99_itl_ms": None}, "has no p99_itl_ms"),
    ],
)
def test_what_is_no_result_is_an_error(change, sentence):
    with pytest.raises(EngineError, match=sentence):
        read_metrics({**RESULT, **change}, 2.0)


def asked(notes: Path) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    return [dict(pairwise(line)) for line in lines]


def test_servers_take_turns_with_new_prompts_each_time(program, address, tmp_path):
    request = read_request(
        {
            "model": "tokenizer",
            "server": [f"plain={address}", f"fast={address}/fast"],
            "request_rate": "2,inf",
            "rounds": 5,
            "out": tmp_path / "out",
        }
    )
    with captured() as (terminal, out, _):
        assert run_bench(request, terminal) == 0
    lines = asked(program)
    order = ["fast" in line["--base-url"] for line in lines]
    assert order == [False, True, False, True, True, False, True, False] * 2 + [
        False, True, False, True,
    ]  # fmt: skip
    assert [line["--request-rate"] for line in lines[:4]] == ["2", "2", "inf", "inf"]
    assert len({line["--seed"] for line in lines if line["--request-rate"] == "2"}) == 10
    assert {line["--model"] for line in lines} == {"served-name"}
    row = next(line for line in out.getvalue().splitlines() if line.startswith("output, all at"))
    assert row.split()[-3:] == ["80.0", "160.0", "(2.00x)"]
    content = json.loads((tmp_path / "out/bench.json").read_text())
    assert content["conditions"]["rates"] == [2.0, "inf"]
    assert content["rows"][1]["served"] == {"address": f"{address}/fast", "model": "served-name"}


def test_a_server_that_fails_is_a_row_with_its_reason(program, address):
    request = read_request(
        {"model": "t", "server": [f"a={address}", f"b={address}/broken"], "rounds": 1}
    )
    with captured() as (terminal, out, _):
        assert run_bench(request, terminal) == 0
    assert "b failed: `vllm bench serve` failed." in out.getvalue()
    assert 'pip install "vllm[bench]"' in out.getvalue()
    with captured() as (terminal, _, _):
        strict = request.model_copy(update={"strict": True})
        assert run_bench(strict, terminal) == 1
        alone = request.model_copy(update={"servers": (f"b={address}/broken",)})
        assert run_bench(alone, terminal) == 1


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt; shells start what runs in the background without that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_client(program, tmp_path, monkeypatch):
    command = ServeCommand()
    pid_file = tmp_path / "pid"

    def interrupt() -> None:
        while not pid_file.exists() or not pid_file.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    wanted = flags(Load(), 1.0, "http://slow", "m", "t", tmp_path / "r.json")
    with pytest.raises(KeyboardInterrupt):
        command.run(wanted, tmp_path / "r.json", tmp_path / "log")
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
