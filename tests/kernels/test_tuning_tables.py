"""Tables of measured tiles: what is read, what is refused, and which of two wins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from quantkit_kernels import tuning_tables
from quantkit_kernels.scaled_mm.triton_tiles import select_scaled_tile
from quantkit_kernels.tile_choice import (
    KERNELS,
    forget_tables,
    llm_int8_tile,
    scaled_tile,
    wna16_tile,
)
from quantkit_kernels.tuning import BUCKETS, Device
from quantkit_kernels.tuning_tables import (
    FOLDER,
    Product,
    TableError,
    file_name,
    read_table,
    render_table,
)
from quantkit_kernels.wna16.triton_tiles import select_tile
from tests.kernels.aot import DEVICES

_, _, H200, _ = DEVICES
W4 = Product("wna16-int4", 4096, 8192, 128)
FP8 = Product("scaled-e4m3", 4096, 8192, 0)
W4_TILE = select_tile(1, 4096, 8192, 4, 128, H200)
FP8_TILE = select_scaled_tile(1, 4096, 8192, 128, False, H200)
OTHER_W4 = replace(W4_TILE, warps=8, splits=1)
OTHER_FP8 = replace(FP8_TILE, stages=2, splits=1)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    forget_tables()
    yield
    forget_tables()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own."""
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv(FOLDER, str(own))
    return own


def write(folder: Path, tiles: dict[tuple[Product, int], Any], device: Device = H200) -> Path:
    file = folder / file_name(device.name)
    file.write_text(render_table(device.name, "by a test", tiles))
    return file


def w4_tile(m: int, device: Device = H200) -> Any:
    return wna16_tile(m, W4.n, W4.k, 4, W4.group, "int", device)


def test_every_gpu_has_a_file_of_its_own() -> None:
    assert file_name("NVIDIA H200") == "nvidia-h200.json"
    assert file_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb.json"
    assert len({file_name(device.name) for device in DEVICES}) == len(DEVICES)


def test_a_measured_tile_serves_its_bucket_and_nothing_else(folder: Path) -> None:
    write(folder, {(W4, 8): OTHER_W4})
    assert [w4_tile(m) == OTHER_W4 for m in (4, 5, 8, 9)] == [False, True, True, False]
    assert w4_tile(4) == select_tile(4, W4.n, W4.k, 4, 128, H200)
    (*_, b200) = DEVICES
    assert w4_tile(8, b200) == select_tile(8, W4.n, W4.k, 4, 128, b200)
    assert wna16_tile(8, W4.n, W4.k, 8, 128, "int", H200) != OTHER_W4
    assert wna16_tile(8, W4.n, W4.k, 4, 64, "int", H200) != OTHER_W4


def test_kernels_do_not_share_tiles(folder: Path) -> None:
    write(folder, {(FP8, 8): OTHER_FP8})
    shape = (8, FP8.n, FP8.k)
    assert scaled_tile(*shape, 128, False, "e4m3", H200) == OTHER_FP8
    assert scaled_tile(*shape, 128, False, "int", H200) != OTHER_FP8
    assert scaled_tile(*shape, 128, True, "e4m3", H200) != OTHER_FP8
    assert llm_int8_tile(*shape, H200) != OTHER_FP8


def test_own_tables_win_over_the_shipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_tables, "SHIPPED", tmp_path)
    third = replace(W4_TILE, stages=2)
    write(tmp_path, {(W4, 8): OTHER_W4, (W4, 16): OTHER_W4})
    write(folder, {(W4, 8): third})
    assert w4_tile(8) == third
    assert w4_tile(16) == OTHER_W4


def test_shipped_tables_can_be_read() -> None:
    for file in tuning_tables.SHIPPED.glob("*.json"):
        gpu = json.loads(file.read_text())["gpu"]
        assert read_table(file, replace(H200, name=gpu), KERNELS)


def test_a_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "/nowhere")
    with pytest.raises(TableError, match=f"{FOLDER} is /nowhere, which is no folder"):
        w4_tile(1)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tiles = {(W4, bucket): OTHER_W4 for bucket in BUCKETS} | {(FP8, 1): OTHER_FP8}
    assert read_table(write(tmp_path, tiles), H200, KERNELS) == tiles


def entry(tile: dict[str, Any], bucket: str = "8", **changes: Any) -> dict[str, Any]:
    return {**W4._asdict(), "tiles": {bucket: tile}, **changes}


GOOD = asdict(W4_TILE)
SCALED = asdict(FP8_TILE)
SCALED_ENTRY = {**FP8._asdict(), "tiles": {"8": SCALED}}


def scaled(**changes: Any) -> list[Any]:
    return [{**SCALED_ENTRY, "tiles": {"8": SCALED | changes}}]


FAULTS: list[tuple[Any, str]] = [
    (["text"], "entry 0 is 'text', but should have kernel, n, k, group, tiles"),
    ([entry(GOOD), entry(GOOD)], "entry 1, wna16-int4 n=4096 k=8192 group=128, is there twice"),
    ([entry(GOOD, "9")], "bucket 9: buckets are 1, 2, 4"),
    ([entry(GOOD, kernel="conv")], "entry 0, conv n=4096 .*: kernels are wna16-int2, wna16-int4"),
    ([entry(GOOD, n="4096")], "entry 0: n is '4096', which is no int"),
    ([entry(GOOD, size=1)], "entry 0 has size, which means nothing"),
    ([entry(GOOD, k=8100)], "k is 8100, but weights have a multiple of 128 columns"),
    ([entry(GOOD | {"depth": 3})], "bucket 8 has depth, which means nothing"),
    ([entry({"block_m": 16})], "bucket 8 lacks block_n, "),
    ([entry(GOOD | {"splits": True})], "splits is True, which is no int"),
    ([entry(GOOD | {"scale_weights": 1})], "scale_weights is 1, which is no bool"),
    ([entry(GOOD | {"block_m": 48})], "block_m is 48, which is no power of two from 16 on"),
    ([entry(GOOD | {"block_n": 8})], "block_n is 8, which is no power of two from 16 on"),
    ([entry(GOOD | {"warps": 3})], "warps is 3, which is no power of two"),
    ([entry(GOOD | {"stages": 0})], "stages is 0, which is not between"),
    ([entry(GOOD | {"splits": 0})], "splits is 0, which is less than 1"),
    ([entry(GOOD | {"splits": 63})], "of 63 splits some have none of the 64 steps"),
    ([entry(GOOD | {"splits": 65})], "of 65 splits some have none of the 64 steps"),
    ([entry(GOOD | {"scale_weights": False}, group=64)], "groups of 64 do not allow"),
    ([entry(GOOD | {"block_m": 128, "stages": 9})], "shared memory, but the GPU has 232448"),
    (scaled(block_m=128, stages=9), "shared memory, but the GPU has 232448"),
    ([{**SCALED_ENTRY, "group": 64}], "a step of 128 columns has more than one scale"),
]


@pytest.mark.parametrize(("entries", "reason"), FAULTS, ids=[reason for _, reason in FAULTS])
def test_a_faulty_entry_is_named(entries: Any, reason: str, folder: Path) -> None:
    table = {"format": 1, "gpu": H200.name, "measured": "by a test", "entries": entries}
    (folder / "nvidia-h200.json").write_text(json.dumps(table))
    with pytest.raises(TableError, match=f"nvidia-h200.json: .*{reason}.*; correct the file"):
        wna16_tile(1, 64, 128, 4, 128, "int", H200)  # a product that the table does not have


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", r"its format is \[\], but 1 is what this version reads"),
        ('{"format": 2, "tables": []}', "its format is 2, but 1 is"),
        ('{"format": 1, "gpu": "NVIDIA H200", "entries": []}', "the file lacks measured"),
        (
            '{"format": 1, "gpu": "NVIDIA H20", "measured": "", "entries": []}',
            "measured on 'NVIDIA H20', but this is 'NVIDIA H200'",
        ),
    ],
)
def test_a_file_that_is_no_table(content: str, reason: str, folder: Path) -> None:
    (folder / "nvidia-h200.json").write_text(content)
    with pytest.raises(TableError, match=f"nvidia-h200.json.* {reason}"):
        w4_tile(1)
