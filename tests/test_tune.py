"""The tuner without a GPU: what it tries, what may win, and that a run can end at any moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from benchmarks.tune.__main__ import main, summary
from benchmarks.tune.candidates import neighbours
from benchmarks.tune.jobs import Job, Layer, jobs_of, layers_of, parse_layer, product_of
from benchmarks.tune.record import Record, RecordError, open_record, record_file
from benchmarks.tune.search import GpuLostError, search, tune
from benchmarks.tune.trial import KINDS
from quantkit_kernels.tile_choice import KERNELS, forget_tables, wna16_tile
from quantkit_kernels.tuning import BUCKETS
from quantkit_kernels.tuning_tables import FOLDER, Product, file_name, read_table
from tests.kernels.aot import DEVICES

_, _, H200, _ = DEVICES
W4 = Product("wna16-int4", 4096, 8192, 128)
JOBS = jobs_of(["wna16-int4", "scaled-e4m3"], [Layer(4096, 8192, 128)], (1, 64))


class FakeTrial:
    """Times from a formula, faults from another.

    Attributes:
        checked: tiles whose results were looked at.
        timed: tiles that were raced.
    """

    def __init__(
        self, cost: Callable[[Any], float], fault: Callable[[Any], str] = lambda tile: ""
    ) -> None:
        self._cost, self._fault = cost, fault
        self.checked: list[Any] = []
        self.timed: list[Any] = []

    def fault(self, tile: Any) -> str:
        self.checked.append(tile)
        return self._fault(tile)

    def race(self, tiles: Sequence[Any], rounds: int) -> Mapping[Any, float]:
        self.timed += tiles
        return {tile: self._cost(tile) for tile in tiles}


def start_of(job: Job) -> Any:
    return KERNELS[job.product.kernel].heuristic(job.product, job.bucket, H200)


def deep(tile: Any) -> float:
    """Best with two stages and eight warps, steps away from any heuristic."""
    return 1.0 + abs(tile.stages - 2) + abs(tile.warps - 8)


def run(
    folder: Path,
    prepare: Callable[[Job], Any] = lambda job: FakeTrial(deep),
    seconds_left: Callable[[], float] = lambda: 1.0,
    jobs: Sequence[Job] = JOBS,
) -> list[str]:
    """A run of the tuner; what it said."""
    record, said = open_record(folder, H200.name, "torch 9"), []
    save = lambda: record.save(folder)  # noqa: E731
    tune(record, jobs, prepare, H200, seconds_left, save, said.append)
    return said


@given(
    layer=st.tuples(st.integers(1, 60000), st.integers(1, 30000)),
    group=st.sampled_from((0, 32, 64, 128)),
    kernel=st.sampled_from(sorted(set(KINDS) & set(KERNELS))),
    bucket=st.sampled_from(BUCKETS),
    device=st.sampled_from(DEVICES),
)
def test_neighbours_differ_in_one_respect_and_can_run(layer, group, kernel, bucket, device):
    product = product_of(kernel, Layer(*layer, group))
    tile = KERNELS[kernel].heuristic(product, bucket, device)
    near = neighbours(tile, product, device)
    assert near
    assert len(set(near)) == len(near)
    for other in near:
        changed = [f.name for f in fields(tile) if getattr(tile, f.name) != getattr(other, f.name)]
        assert len(changed) == 1
        assert KERNELS[kernel].refusal(other, product, device) == ""


def test_the_search_climbs_to_the_best_tile():
    finding = search(JOBS[0], FakeTrial(deep), H200)
    assert (finding.best.stages, finding.best.warps) == (2, 8)
    assert finding.ms == 1.0
    assert finding.gain == deep(start_of(JOBS[0])) > 1


def test_a_wrong_tile_never_wins():
    def fault(tile: Any) -> str:
        return "is off" if tile.stages == 2 else ""

    trial = FakeTrial(deep, fault)
    finding = search(JOBS[0], trial, H200)
    assert finding.best.stages == 3
    assert all(tile.stages != 2 for tile in trial.timed)
    assert {one.reason for one in finding.tried if one.tile.stages == 2} == {"is off"}


def test_noise_does_not_replace_the_heuristic():
    start = start_of(JOBS[0])
    finding = search(JOBS[0], FakeTrial(lambda tile: 1.0 if tile == start else 0.99), H200)
    assert finding.best == start


def test_no_tile_is_tried_twice():
    trial = FakeTrial(deep)
    search(JOBS[0], trial, H200)
    assert len(set(trial.checked)) == len(trial.checked)


def test_a_wrong_heuristic_is_told_and_the_others_measured(tmp_path):
    def prepare(job: Job) -> FakeTrial:
        return FakeTrial(deep, lambda tile: "is off" if job == JOBS[1] else "")

    said = run(tmp_path, prepare)
    assert f"{JOBS[1]} cannot be measured: the heuristic's tile" in "\n".join(said)
    assert open_record(tmp_path, H200.name, "torch 9").missing(JOBS) == [JOBS[1]]


def test_what_is_found_is_served(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    forget_tables()
    tile = wna16_tile(1, W4.n, W4.k, 4, W4.group, "int", H200)
    forget_tables()
    assert (tile.stages, tile.warps) == (2, 8)


class KilledError(BaseException):
    """As a signal ends a process: nothing catches it."""


@pytest.mark.parametrize("survivors", [0, 1, 3])
def test_a_killed_run_is_continued(survivors, tmp_path):
    prepared: list[Job] = []

    def prepare(job: Job) -> FakeTrial:
        if len(prepared) == survivors:
            raise KilledError
        prepared.append(job)
        return FakeTrial(deep)

    with pytest.raises(KilledError):
        run(tmp_path, prepare)
    record = open_record(tmp_path, H200.name, "torch 9")
    assert list(record.findings) == JOBS[:survivors]
    again: list[Job] = []
    run(tmp_path, lambda job: again.append(job) or FakeTrial(deep))
    assert again == JOBS[survivors:]
    table = read_table(tmp_path / file_name(H200.name), H200, KERNELS)
    assert set(table) == {(job.product, job.bucket) for job in JOBS}
    assert run(tmp_path) == [f"All {len(JOBS)} jobs are measured already; nothing is to do."]


def test_a_kill_while_writing_loses_one_job(tmp_path, monkeypatch):
    run(tmp_path, jobs=JOBS[:1])
    before = {file: file.read_text() for file in tmp_path.iterdir()}

    def killed(source: Path, target: Path) -> None:
        Path(source).write_text("half of it")
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KilledError):
            run(tmp_path)
    assert {file: file.read_text() for file in before} == before
    run(tmp_path)
    assert open_record(tmp_path, H200.name, "torch 9").missing(JOBS) == []


def test_it_stops_when_time_is_up(tmp_path):
    clock = iter((2.0, 1.0, 0.0))
    said = run(tmp_path, seconds_left=lambda: next(clock))
    assert said[-1] == "Out of time: 2 jobs are left. Run this again to go on."
    assert list(open_record(tmp_path, H200.name, "torch 9").findings) == JOBS[:2]


def test_a_tile_that_loses_the_gpu_is_not_tried_again(tmp_path):
    lethal = replace(start_of(JOBS[0]), warps=8)

    def fault(tile: Any) -> str:
        if tile == lethal:
            raise GpuLostError(tile, "fails: illegal memory access")
        return ""

    with pytest.raises(GpuLostError, match=r"illegal memory access\. The GPU is lost"):
        run(tmp_path, lambda job: FakeTrial(deep, fault))
    run(tmp_path, lambda job: FakeTrial(deep, fault), jobs=JOBS[:1])
    finding = open_record(tmp_path, H200.name, "torch 9").findings[JOBS[0]]
    assert finding.best != lethal
    assert "fails: illegal memory access" in {one.reason for one in finding.tried}


def test_a_heuristic_that_loses_the_gpu_is_not_tried_again(tmp_path):
    def fault(tile: Any) -> str:
        raise GpuLostError(tile, "fails: illegal memory access")

    with pytest.raises(GpuLostError):
        run(tmp_path, lambda job: FakeTrial(deep, fault))
    said = run(tmp_path, lambda job: FakeTrial(deep, fault), jobs=JOBS[:1])
    assert "cannot be measured: the heuristic's tile" in said[0]
    assert "illegal memory access" in said[0]


def test_a_record_survives_reading(tmp_path):
    run(tmp_path)
    record = open_record(tmp_path, H200.name, "torch 9")
    record.save(tmp_path)
    assert open_record(tmp_path, H200.name, "torch 9") == record


@pytest.mark.parametrize("content", ["{", "{}", '{"gpu": "", "measured": "", "findings": [1]}'])
def test_a_damaged_record_is_refused(content, tmp_path):
    record_file(tmp_path, H200.name).write_text(content)
    with pytest.raises(RecordError, match=r"record.json is damaged .*; delete it to start anew"):
        open_record(tmp_path, H200.name, "torch 9")


def test_other_versions_do_not_share_a_record(tmp_path):
    run(tmp_path)
    with pytest.raises(RecordError, match=r"with torch 9, but this is NVIDIA H200 with torch 10"):
        open_record(tmp_path, H200.name, "torch 10")


def test_the_summary_says_what_was_gained(tmp_path):
    run(tmp_path)
    text = summary(open_record(tmp_path, H200.name, "torch 9"), JOBS)
    assert "wna16-int4: " in text
    assert "of 2 jobs" in text


def test_the_layers_of_a_model():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
    )
    whole = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    halves = [(3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168)]
    assert [layer[:2] for layer in layers_of(config, 128, 1)] == whole
    assert [layer[:2] for layer in layers_of(config, 128, 2)] == halves


def test_products_are_padded_as_weights_are():
    layer = Layer(300, 1000)
    assert product_of("wna16-nf4", layer) == Product("wna16-nf4", 300, 1024, 128)
    assert product_of("scaled-int8", layer) == Product("scaled-int8", 300, 1000, 0)
    assert product_of("llm_int8", Layer(300, 1000, 128)) == Product("llm_int8", 300, 1000, 0)


def test_shapes_are_read():
    assert parse_layer("4096,14336") == Layer(4096, 14336)
    assert parse_layer("4096,14336,32") == Layer(4096, 14336, 32)


@pytest.mark.parametrize("text", ["4096", "4096,x", "0,4096", "1,2,3,4"])
def test_a_shape_that_is_none_is_told(text, capsys):
    with pytest.raises(SystemExit):
        main(["--shapes", text, "--kernels", "wna16-int4", "--out", "unused"])
    assert f"'{text}' is no shape; give N,K or N,K,GROUP" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--shapes", "64,128", "--kernels", "wna16-int4", "--out", "unused"]) == 1
    assert "torch finds no CUDA device here" in capsys.readouterr().out


def test_a_run_ends_with_what_it_gained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H200.name)

    def measure(record: Record, jobs: Sequence[Job], out: Path, seconds: float) -> int:
        assert [job.bucket for job in jobs] == [1, 8]
        assert seconds == 120
        save = lambda: record.save(out)  # noqa: E731
        return tune(record, jobs, lambda job: FakeTrial(deep), H200, lambda: 1.0, save, print)

    monkeypatch.setattr("benchmarks.tune.__main__.measure", measure)
    asked = ["--shapes", "4096,8192,32", "--kernels", "wna16-int4", "--buckets", "1", "8"]
    where = ["--out", str(tmp_path / "new"), "--budget-minutes", "2"]
    assert main([*asked, *where]) == 0
    said = capsys.readouterr().out
    assert "wna16-int4 n=4096 k=8192 group=32 m<=8: 1.0000 ms" in said
    assert "in the geometric mean of 2 jobs" in said
    assert said.endswith(f"Serve with {FOLDER}={tmp_path / 'new'}\n")
    assert (tmp_path / "new" / "nvidia-h200.json").exists()
