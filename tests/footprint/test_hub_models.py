"""Models on the hub: their headers are read, their weights are not, and refusals say what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.footprint.hub_server import MOST_BYTES, READING, hub, read_all
from vllm_quantkit.footprint import read_model

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "tiny-lm"


def read_from(endpoint: str, cache: Path, *models: str) -> dict[str, dict[str, object]]:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READING, *models],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return read_all(done.stdout)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The demo model as one file and as two, quantised, without weights, and broken."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    shutil.copytree(DEMO / "bf16", folder / "whole")
    shutil.copytree(DEMO / "awq", folder / "awq")
    for name in ("bare", "pickled", "broken", "gated"):
        (folder / name).mkdir()
    for name in ("pickled", "broken", "gated"):
        shutil.copy(DEMO / "bf16" / "config.json", folder / name)
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"not read")
    (folder / "broken" / "config.json").write_text("{")
    split(DEMO / "bf16", folder / "split")
    return folder.parent


def split(model: Path, out: Path) -> None:
    """The model in two files with an index."""
    out.mkdir()
    shutil.copy(model / "config.json", out)
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, out / file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_headers_are_read_and_refusals_say_what_to_do(models, tmp_path):
    names = ("whole", "split", "awq", "pickled", "bare", "broken", "gated", "absent", "whole@old")
    with hub(models, gated=("tiny/gated",)) as (endpoint, sent):
        found = read_from(endpoint, tmp_path, *(f"tiny/{name}" for name in names))
    local = {name: read_model(str(DEMO / name)) for name in ("bf16", "awq")}
    whole = {
        "parameters": local["bf16"].facts.parameters,
        "listed": True,
        "tensors": len(local["bf16"].tensors),
        "quantised": False,
    }
    assert found["tiny/whole"] == found["tiny/split"] == whole
    assert found["tiny/awq"]["parameters"] == whole["parameters"]
    assert found["tiny/awq"]["quantised"] is True
    assert found["tiny/pickled"] == {**whole, "listed": False}
    expected = {
        "bare": "has no config.json",
        "broken": "is not valid JSON",
        "gated": "is gated: ask for access",
        "absent": "neither a folder here nor a model on the hub",
        "whole@old": "has no such revision",
    }
    for name, words in expected.items():
        message = str(found[f"tiny/{name}"]["error"])
        assert message.startswith("CheckpointError: ")
        assert words in message
    weights = sum(size for file, size in sent.items() if file.endswith(".safetensors"))
    assert weights < 4 * MOST_BYTES
    assert weights < (DEMO / "bf16" / "model.safetensors").stat().st_size / 10


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path):
    found = read_from("http://127.0.0.1:9", tmp_path, "tiny/whole")["tiny/whole"]
    assert "the hub cannot be asked for it" in str(found["error"])
    assert "check the network, or give a folder" in str(found["error"])
