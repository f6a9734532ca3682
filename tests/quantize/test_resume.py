"""A run that was killed goes on with --resume, and the result is the same bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quantize.interrupted_runs import KEYS, PHASES
from tests.quantize.quantized_runs import random_sets, run
from vllm_quantkit.errors import CheckpointError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def killed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each killed run left."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.quantize.interrupted_runs", str(llama), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(PHASES)
    shutil.copytree(folder / "round-2.partial", folder / "other.partial")
    return folder


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that nobody disturbs writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(llama, out, KEYS, random_sets())
    return out


@pytest.mark.parametrize(("phase", "count"), PHASES)
def test_a_killed_run_goes_on(
    phase: str, count: int, killed: Path, whole: Path, llama: Path
) -> None:
    out = killed / f"{phase}-{count}"
    partial = out.with_name(f"{out.name}.partial")
    assert partial.is_dir()
    assert not out.exists(), "nothing looks finished"
    done = len(list((partial / "blocks").glob("*.json")))
    assert done == {"round": count - 1, "transform": count - 1, "write": count}.get(
        phase, {"enter": 0, "observe": 0, "advance": 1, "measure": 2, "assemble": 2}.get(phase)
    )
    with pytest.raises(CheckpointError, match="--resume"):
        run(llama, out, KEYS, random_sets())
    resumed = run(llama, out, KEYS, random_sets(), resume=True)
    assert resumed.quality is not None
    assert not partial.exists()
    for path in whole.iterdir():
        if path.suffix in {".safetensors", ".jinja"} or path.name == "config.json":
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_a_run_goes_on_only_with_the_same_plan(llama: Path, killed: Path) -> None:
    out = killed / "other"
    with pytest.raises(CheckpointError, match="recipe"):
        run(llama, out, KEYS | {"group_size": 64}, random_sets(), resume=True)
    with pytest.raises(CheckpointError, match="calibration"):
        run(llama, out, KEYS, random_sets(samples=9), resume=True)
