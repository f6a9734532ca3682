"""`quantkit compare` with real engines, on the demo model, in its quick form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.integration.engines import ENVIRONMENT, ROOT
from tests.integration.warm_worker import ADDRESS
from vllm_quantkit import cli
from vllm_quantkit.compare.result import Comparison, RowResult
from vllm_quantkit.engine.client import Engine
from vllm_quantkit.quantize.job import Job

pytestmark = pytest.mark.engine

DEMO = ROOT / "examples" / "tiny-lm"
COMMAND = (
    *("compare", str(DEMO / "bf16"), "--quick", "--rows", "fp8,awq+kv4", "--windows", "3"),
    *("--calibration", str(DEMO / "data/calibration.txt"), "--length", "128"),
    *("--text", str(DEMO / "data/held_out.txt"), "--json"),
)

PREDICTED = 0.03
"""Relative: memory is to be foreseen so well."""


@pytest.fixture(scope="module")
def _warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines that are forked from a process which has imported vLLM."""
    folder = tmp_path_factory.mktemp("warm")
    address, log = str(folder / "socket"), (folder / "host.log").open("w")
    environment = {**ENVIRONMENT, ADDRESS: address, "QUANTKIT_CACHE": str(folder / "cache")}
    host = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.warm_host", address],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert host.stdout is not None
    assert json.loads(host.stdout.readline() or "{}") == {"ready": True}, log.name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "WORKER", "tests.integration.warm_worker")
        for name, value in environment.items():
            patch.setenv(name, value)
        yield
    host.kill()
    host.wait()
    host.stdout.close()
    log.close()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


def run(out: Path) -> Result:
    return CliRunner().invoke(cli.app, [*COMMAND, "--work", str(out / "work"), "--out", str(out)])


@pytest.fixture(scope="module")
def rows(_warm: None, out: Path) -> dict[str, RowResult]:
    result = run(out)
    assert result.exit_code == 0, result.stderr
    found = Comparison.model_validate_json(result.stdout)
    assert found.quick
    return {row.name: row for row in found.rows}


def test_every_figure_of_every_row_is_there(rows: dict[str, RowResult]) -> None:
    assert list(rows) == ["16-bit", "fp8", "awq+kv4"]
    for name, row in rows.items():
        assert row.failures == ()
        assert row.decode[1].sample.median > 0
        assert row.prefill[128].sample.median > 0
        assert row.perplexity is not None
        if name != "16-bit":
            assert row.quality is not None
            assert row.decode[1].ratio is not None
            assert row.quantise_seconds is not None
    assert [str(row.bits) for row in rows.values()] == ["16/16/16", "8/8/16", "4/16/4"]


def test_quality_falls_with_the_bits(rows: dict[str, RowResult]) -> None:
    fp8, awq = rows["fp8"].quality, rows["awq+kv4"].quality
    assert fp8 is not None
    assert awq is not None
    assert 0 < fp8.divergence.value < awq.divergence.value < 0.1
    assert fp8.base_perplexity == awq.base_perplexity == rows["16-bit"].perplexity


def test_memory_is_as_foreseen(rows: dict[str, RowResult]) -> None:
    for row in rows.values():
        assert row.weight_bytes == pytest.approx(row.weight_bytes_predicted, rel=PREDICTED)
    assert rows["awq+kv4"].weight_bytes < rows["fp8"].weight_bytes < rows["16-bit"].weight_bytes
    shares = [row.kv_bytes_per_token * row.cache_tokens for row in rows.values()]
    # The cache takes a GiB whatever a token takes, less a part of a block.
    assert shares == pytest.approx([1 << 30] * 3, rel=PREDICTED)


def test_a_second_run_makes_and_starts_nothing(
    rows: dict[str, RowResult], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Job, "quantize", lambda *_: pytest.fail("it was made again"))
    monkeypatch.setattr(Engine, "__init__", lambda *_: pytest.fail("it was measured again"))
    before = json.loads((out / "table.json").read_text())
    result = run(out)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == before
    assert {path.suffix for path in out.glob("table.*")} == {".md", ".csv", ".json", ".svg"}
