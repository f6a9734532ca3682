"""A run's folder: refusals, kills at every file operation, full disks, and the result."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.quantize.workspace_run import BLOCKS, PLAN, block, killed, run
from vllm_quantkit.checkpoint import read_headers
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.quantize.output import disk, model_folder, safetensors_merge
from vllm_quantkit.quantize.output.records import BlockRecord, LayerRecord
from vllm_quantkit.quantize.output.workspace import Workspace

LAYER = LayerRecord(name="a", scheme="4 bits", method="rtn", weight_error=0.5, digest="d")
RECORD = BlockRecord(index=0, layers=(LAYER,), seconds={"round": 1.5})


@pytest.fixture
def source(tmp_path):
    """A model of two files, with a tensor of every dtype and odd sizes beside its layers."""
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    first = {f"layers.{i}.w.weight": torch.randn(300, 7).bfloat16() for i in range(BLOCKS)}
    second = {
        "bool": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "e4m3": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "half": torch.randn(3).half(),
        "double": torch.randn(2, 1).double(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "layers.10.norm": torch.randn(9),
        "layers.9.norm": torch.randn(9),
    }
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    names = {
        **dict.fromkeys(first, "model-00001-of-00002.safetensors"),
        **dict.fromkeys(second, "model-00002-of-00002.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "kept": 1}))
    for name in ("tokenizer.json", "modeling_x.py", "README.md", "sub/inner.json", "sub/b.py"):
        (folder / name).write_text(name)
    for name in ("quantkit_report.json", ".hidden", "old.bin", "w.gguf", "quantize_config.json"):
        (folder / name).write_text("stays behind")
    (folder / "original").mkdir()
    (folder / "original" / "weights.pth").write_text("")
    (folder / "original" / "params.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """What a killed process wrote is there without; only a power cut needs it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def begin(out, plan=PLAN, *, resume=False):
    return Workspace.create(out, plan, resume=resume)


def test_the_result_is_the_source_with_the_blocks_in_place(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    kept = {n: t for n, t in weights(source).items() if not n.endswith("w.weight")}
    expected = kept | {name: t for i in range(BLOCKS) for name, t in block(i).items()}
    found = weights(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].double(), tensor.double())
    names = {"model.safetensors", "config.json", "README.md", "tokenizer.json", "modeling_x.py"}
    assert contents(out).keys() == {*names, "sub/inner.json", "sub/b.py"}
    config = json.loads((out / "config.json").read_text())
    assert config == {"model_type": "x", "kept": 1, "quantized": True}
    assert (out / "README.md").read_text() == "card\n"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_every_tensor_is_aligned_and_the_file_says_what_it_is(source, tmp_path):
    run(source, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    for name, header in read_headers(tmp_path / "out").items():
        assert header.offset % header.dtype.itemsize == 0, name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards(source, tmp_path):
    with begin(tmp_path / "out") as workspace:
        for index in range(BLOCKS):
            workspace.write_block(index, block(index), RECORD)
        replaced = [f"layers.{index}.w.weight" for index in range(BLOCKS)]
        workspace.finish(source, replaced, {}, {}, max_shard_bytes=9000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(files) == {
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    }
    assert len(files) > 2
    assert index["weight_map"] == {name: file for file, held in files.items() for name in held}
    sizes = {file: sum(t.nbytes for t in held.values()) for file, held in files.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert max(sizes.values()) <= 9000
    where = index["weight_map"]
    assert where["layers.9.norm"] <= where["layers.10.norm"]
    assert len(read_headers(tmp_path / "out")) == len(where)


def test_blocks_and_notes_are_kept(tmp_path):
    with begin(tmp_path / "out") as workspace:
        assert not workspace.block_done(0)
        workspace.write_block(0, block(0), RECORD)
        workspace.note("quality", {"perplexity": 5.5})
    with begin(tmp_path / "out", resume=True) as workspace:
        assert workspace.block_done(0)
        assert not workspace.block_done(1)
        assert workspace.record(0) == RECORD
        read = workspace.read_block(0)
        assert all(torch.equal(read[name], tensor) for name, tensor in block(0).items())
        assert workspace.load_note("quality") == {"perplexity": 5.5}
        assert workspace.load_note("other") is None


def test_a_block_without_its_record_is_not_done(tmp_path):
    with begin(tmp_path / "out") as workspace:
        workspace.write_block(0, block(0), RECORD)
        (workspace.folder / "blocks" / "00000.json").unlink()
        assert not workspace.block_done(0)
        with pytest.raises(CheckpointError, match=r"00000\.json cannot be read"):
            workspace.record(0)


def test_refusals(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"source already exists: remove it"):
        begin(source)
    out = tmp_path / "out"
    begin(out).close()
    with pytest.raises(CheckpointError, match=r"out\.partial exists: .* by --resume, or delete"):
        begin(out)
    plan = {**PLAN, "recipe": {"bits": 3}}
    changed = r"begun with recipe\.bits = 4, but now recipe\.bits = 3\. Resume with the same"
    with pytest.raises(CheckpointError, match=changed):
        begin(out, plan, resume=True)
    with pytest.raises(CheckpointError, match="begun with blocks = 2, but now blocks = nothing"):
        begin(out, {"recipe": PLAN["recipe"]}, resume=True)
    begin(out, resume=True).close()
    begin(tmp_path / "new", resume=True).close()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds 'thesis\.txt' and no plan\.json"):
        begin(tmp_path / "out", resume=True)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_two_processes_do_not_share_it(tmp_path):
    with begin(tmp_path / "out"):
        for resume in (True, False):
            with pytest.raises(CheckpointError, match=r"Another process works in .*out\.partial"):
                begin(tmp_path / "out", resume=resume)
    begin(tmp_path / "out", resume=True).close()


def test_tensors_that_do_not_fit_the_source(source, tmp_path):
    with begin(tmp_path / "out") as workspace:
        workspace.write_block(0, {"half": torch.ones(1)}, RECORD)
        with pytest.raises(CheckpointError, match=r"has no tensor 'b' \(1 such"):
            workspace.finish(source, ["b"], {}, {})
        with pytest.raises(CheckpointError, match="has the tensor 'half' already"):
            workspace.finish(source, [], {}, {})
        workspace.finish(source, ["half"], {}, {})
    assert weights(tmp_path / "out")["half"].tolist() == [1.0]


def test_a_run_killed_at_any_file_operation_goes_on_to_the_same_bytes(source, tmp_path):
    run(source, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    deadly, was_killed = 0, True
    while was_killed:
        deadly += 1
        out = tmp_path / f"out{deadly}"
        was_killed = killed(source, out, deadly)
        if out.exists():
            assert contents(out) == expected, "what is not complete looks finished"
        else:
            run(source, out)
            assert contents(out) == expected
            assert not out.with_name(f"{out.name}.partial").exists()
        shutil.rmtree(out)
    assert deadly > 50, "the operations were not counted"


def test_a_run_killed_again_and_again_comes_to_its_end(source, tmp_path):
    run(source, tmp_path / "whole")
    out, chance = tmp_path / "out", random.Random(0)
    kills = sum(killed(source, out, chance.randint(5, 25)) for _ in range(6))
    assert kills == 6
    assert not out.exists()
    run(source, out)
    assert contents(out) == contents(tmp_path / "whole")


class FullDisk:
    """Lets a number of bytes be written, then fails as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        for module in (safetensors_merge, model_folder):
            monkeypatch.setattr(module, "flush", self.flush)

    def flush(self, file):
        self.room -= file.tell()
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("room", [0, 100, 5_000, 9_000, 20_000, 27_000])
def test_a_full_disk_leaves_nothing_that_looks_finished(room, source, tmp_path, monkeypatch):
    run(source, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        FullDisk(patch, room)
        with pytest.raises(CheckpointError, match=r"disk of .*out\.partial is full: .* --resume"):
            run(source, out)
    assert not out.exists()
    partial = tmp_path / "out.partial"
    assert not (partial / "final").exists()
    assert not list(partial.rglob("*.tmp"))
    run(source, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_room_is_checked_before_the_result_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1234)
    with begin(tmp_path / "out") as workspace:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(
            CheckpointError, match=r"is full: 1,234 bytes are free, and 9,\d{3} bytes"
        ):
            workspace.finish(source, [], {}, {})
        assert not (workspace.folder / "final").exists()


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path):
    with (
        pytest.raises(OSError, match="Input/output"),
        disk.translate_disk_full(tmp_path, 0),
    ):
        raise OSError(errno.EIO, "Input/output error")


def test_a_truncated_block_is_found(source, tmp_path):
    with begin(tmp_path / "out") as workspace:
        workspace.write_block(0, block(0), RECORD)
        path = workspace.folder / "blocks" / "00000.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            workspace.read_block(0)
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            workspace.finish(source, [], {}, {})
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_config_is_named(source, tmp_path):
    (source / "config.json").unlink()
    with (
        begin(tmp_path / "out") as workspace,
        pytest.raises(CheckpointError, match=r"config\.json cannot be read"),
    ):
        workspace.finish(source, [], {}, {})
