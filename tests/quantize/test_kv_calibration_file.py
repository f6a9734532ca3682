"""The folder in which a calibration of the KV cache is kept."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_quantkit import kv_calibration
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.kv_calibration import (
    FP8_FILE,
    INT4_FILE,
    SUMMARY_FILE,
    KeyChoice,
    KVCalibration,
    KVErrors,
    KVLayer,
    KVLayerRecord,
    KVSummary,
    read_kv_calibration,
    write_kv_calibration,
)

ERRORS = KVErrors(logits=0.1, softmax=0.05, values=0.09, output=0.1)
LAYERS: dict[str, KeyChoice] = {"a.attn": "none", "b.attn": "shift", "c.attn": "shift+scale"}
FILES = {FP8_FILE, INT4_FILE, SUMMARY_FILE}


def layer(name: str, choice: KeyChoice) -> KVLayer:
    torch.manual_seed(len(name) + len(choice))
    record = KVLayerRecord(
        name=name,
        dtype="auto" if choice == "shift" else "int4",
        kv_heads=2,
        head_size=48,
        treatment=choice,
        uncalibrated=ERRORS,
        calibrated=ERRORS,
        fp8=ERRORS,
        disagreement=0.1,
        drift=0.2,
    )
    shift = None if choice == "none" else torch.randn(2, 48)
    scale = torch.rand(2, 48) + 0.1 if choice == "shift+scale" else None
    return KVLayer(record, shift, scale, 0.25, 1.5)


@pytest.fixture
def calibration() -> KVCalibration:
    layers = {name: layer(name, choice) for name, choice in LAYERS.items()}
    summary = KVSummary(
        model="m",
        source="text.txt",
        samples=8,
        length=32,
        tokens=256,
        held_out_tokens=64,
        fingerprint="0" * 64,
        key_group=32,
        value_group=64,
        bound=0.25,
        layers=tuple(found.record for found in layers.values()),
    )
    return KVCalibration(summary, layers)


@pytest.fixture
def folder(calibration: KVCalibration, tmp_path: Path) -> Path:
    write_kv_calibration(calibration, tmp_path / "kv_cache")
    return tmp_path / "kv_cache"


def test_what_is_read_is_what_was_written(calibration: KVCalibration, folder: Path):
    found = read_kv_calibration(folder)
    assert found.summary == calibration.summary
    assert list(found.layers) == list(LAYERS)
    for name, expected in calibration.layers.items():
        layer = found.layers[name]
        assert (layer.dtype, layer.k_scale, layer.v_scale) == (expected.record.dtype, 0.25, 1.5)
        for ours, theirs in ((layer.shift, expected.shift), (layer.scale, expected.scale)):
            assert (ours is None) == (theirs is None)
            assert ours is None or theirs is None or torch.equal(ours, theirs)


def test_tensors_are_called_as_vllm_calls_them(folder: Path):
    assert set(load_file(folder / INT4_FILE)) == {
        "b.attn.k_zero_point",
        "c.attn.k_zero_point",
        "c.attn.k_scale",
    }
    fp8 = load_file(folder / FP8_FILE)
    assert set(fp8) == {f"{name}.{scale}" for name in LAYERS for scale in ("k_scale", "v_scale")}
    assert all(scale.shape == () and scale.dtype == torch.float32 for scale in fp8.values())


def test_the_same_calibration_gives_the_same_bytes(calibration: KVCalibration, tmp_path: Path):
    for name in ("x", "y"):
        write_kv_calibration(calibration, tmp_path / name)
    assert {path.name for path in (tmp_path / "x").iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_an_existing_folder_stays(calibration: KVCalibration, tmp_path: Path):
    (tmp_path / "kv_cache").mkdir()
    with pytest.raises(CheckpointError, match=r"kv_cache already exists: remove it"):
        write_kv_calibration(calibration, tmp_path / "kv_cache")
    assert not list((tmp_path / "kv_cache").iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(
    error: BaseException,
    calibration: KVCalibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(path: Path, _: object) -> None:
        assert path.with_name(INT4_FILE).is_file(), "it fails half-way"
        raise error

    monkeypatch.setattr(kv_calibration, "write_json", fail)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="full: kv_cache was not written" if error.args else None):
        write_kv_calibration(calibration, tmp_path / "kv_cache")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_no_hindrance(calibration: KVCalibration, tmp_path: Path):
    left = tmp_path / f"kv_cache.{os.getpid()}.partial"
    left.mkdir()
    (left / INT4_FILE).write_bytes(b"half")
    write_kv_calibration(calibration, tmp_path / "kv_cache")
    assert [path.name for path in tmp_path.iterdir()] == ["kv_cache"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(name: str, folder: Path):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"kv_cache has no {re.escape(name)}: .*anew: quant"):
        read_kv_calibration(folder)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"none is no folder, so it has no kv_cache.json"):
        read_kv_calibration(tmp_path / "none")


@pytest.mark.parametrize("name", [INT4_FILE, FP8_FILE])
def test_a_truncated_file_is_named(name: str, folder: Path):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is truncated or corrupt"):
        read_kv_calibration(folder)


@pytest.mark.parametrize(
    ("file", "tensor", "value", "message"),
    [
        (INT4_FILE, "b.attn.k_zero_point", torch.full((2, 48), torch.nan), "holds nan in 96 of 96"),
        (
            INT4_FILE,
            "c.attn.k_scale",
            torch.full((2, 48), -1.0),
            "-1.0 in 96 of 96.*greater than 0",
        ),
        (INT4_FILE, "c.attn.k_scale", torch.zeros(2, 48), "0.0 in 96 of 96"),
        (INT4_FILE, "c.attn.k_scale", torch.ones(2, 64), r"float32 \[2, 64\], but must be.*48"),
        (INT4_FILE, "c.attn.k_scale", torch.ones(2, 48).half(), r"float16 \[2, 48\], but must"),
        (FP8_FILE, "a.attn.v_scale", torch.tensor(torch.inf), "holds inf in 1 of 1"),
        (FP8_FILE, "a.attn.v_scale", torch.ones(1), r"float32 \[1\], but must be .* \[\]"),
        (INT4_FILE, "b.attn.k_zero_point", None, "lacks b.attn.k_zero_point"),
        (FP8_FILE, "c.attn.k_scale", None, "lacks c.attn.k_scale"),
        (INT4_FILE, "d.attn.k_scale", torch.ones(2, 48), "holds d.attn.k_scale, of which"),
    ],
)
def test_damaged_tensors_are_named(
    file: str, tensor: str, value: torch.Tensor | None, message: str, folder: Path
):
    tensors = load_file(folder / file)
    tensors.pop(tensor, None)
    save_file(tensors if value is None else {**tensors, tensor: value}, folder / file)
    with pytest.raises(CheckpointError, match=rf"{re.escape(file)}.*{message}") as raised:
        read_kv_calibration(folder)
    assert tensor in str(raised.value)
    assert "make it anew: quantkit calibrate-kv MODEL" in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, r"version: .*'2'"),
        ("format", "other", r"format: .*'other'"),
        ("bound", 0, "bound"),
        ("layers", [{"name": "a"}], "layers.0"),
        ("extra", 1, "extra"),
    ],
)
def test_another_summary_is_refused(key: str, value: object, message: str, folder: Path):
    content = json.loads((folder / SUMMARY_FILE).read_text())
    (folder / SUMMARY_FILE).write_text(json.dumps({**content, key: value}))
    with pytest.raises(CheckpointError, match=rf"kv_cache.json is no calibration.*{message}"):
        read_kv_calibration(folder)


def test_a_summary_that_is_no_json_is_refused(folder: Path):
    (folder / SUMMARY_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"kv_cache.json is no calibration.*the file:"):
        read_kv_calibration(folder)
