"""What is kept, what is found again, and what is not trusted."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest

from tests.compare.fakes import make_store, quality_of, timing_of
from vllm_quantkit.bench.noise import Noise
from vllm_quantkit.compare.digests import Digests, digest_of
from vllm_quantkit.compare.result import Timing
from vllm_quantkit.compare.store import file_name
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.evaluate.quality import Quality
from vllm_quantkit.terminal import to_json

KEY = {"model": "abc", "options": (("tensor_parallel_size", 2),), "rate": math.inf}


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    kept = quality_of(0.02)
    store.write("quality", "awq", KEY, kept)
    assert store.read("quality", "awq", KEY, Quality) == kept
    assert store.read("quality", "awq", {**KEY, "model": "abd"}, Quality) is None
    assert store.read("speed", "awq", KEY, Quality) is None
    assert not list(tmp_path.rglob("*.partial"))


def test_infinite_figures_survive(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    broken = quality_of(0.02, divergence_tail=math.inf)
    store.write("quality", "awq", KEY, broken)
    assert store.read("quality", "awq", KEY, Quality) == broken


def test_figures_that_are_computed_do_not_stand_in_the_way(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    noise = Noise(seconds=(1.0, 2.0))
    store.write("noise", "all", KEY, noise)
    assert store.read("noise", "all", KEY, Noise) == noise


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"key": {}, "val', "Unterminated string"),
        ("[]", "no record of this program"),
        ('{"value": {}}', "no record of this program"),
        ('{"key": {"model": "other"}, "value": {}}', "written for something else"),
        ('{"key": KEY, "value": {"tokens": 1}}', "Field required"),
        ("", "Expecting value"),
    ],
)
def test_damaged_and_foreign_records_are_made_again(tmp_path: Path, content: str, why: str) -> None:
    store, aside = make_store(tmp_path)
    path = store.path("quality", "awq", KEY, ".json")
    path.parent.mkdir()
    path.write_text(content.replace("KEY", to_json(KEY)))
    assert store.read("quality", "awq", KEY, Quality) is None
    assert why in aside.getvalue()
    assert "it is made again" in aside.getvalue()
    assert not path.exists()


def test_two_processes_do_not_share_a_store(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    with (
        store.claimed(),
        pytest.raises(CheckpointError, match="Another process works in"),
        store.claimed(),
    ):
        pass


def test_clearing_forgets_everything(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    with store.claimed():
        store.write("speed", "awq", KEY, timing_of(2.0))
        store.clear()
        assert store.read("speed", "awq", KEY, Timing) is None
        assert (tmp_path / "lock").exists()


def test_labels_become_file_names() -> None:
    assert file_name("mine/é 1") == "mine-é-1"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_digest_follows_content_alone(model: Path, tmp_path: Path) -> None:
    digests = Digests(tmp_path / "digests.json")
    before = digests.folder(model)
    os.utime(model / "model.safetensors", (1, 1))
    (model / "README.md").write_text("a card")
    (model / "quantkit_report.json").write_text("{}")
    assert digests.folder(model) == before
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    assert digests.folder(copy) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_digest_changes_with_any_file_that_decides(
    model: Path, tmp_path: Path, name: str
) -> None:
    digests = Digests(tmp_path / "digests.json")
    before = digests.folder(model)
    # The same size, so that content alone tells.
    (model / name).write_bytes(b"[]" if name == "config.json" else b"WEIGHTS")
    assert digests.folder(model) != before


def test_a_file_is_read_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Digests(tmp_path / "digests.json").folder(model)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("it was read again"))
    assert Digests(tmp_path / "digests.json").folder(model) == before


def test_a_damaged_memory_of_digests_is_made_anew(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "digests.json"
    before = Digests(memory).folder(model)
    for content in ("{", "[]", '{"a": 1}'):
        memory.write_text(content)
        assert Digests(memory).folder(model) == before


def test_an_empty_folder_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model"):
        Digests(tmp_path / "digests.json").folder(tmp_path / "empty")


def test_digests_of_keys() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
