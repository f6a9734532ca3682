"""The tuner's correctness gate and its way to a given tile, on kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tune import trial as trials
from benchmarks.tune.jobs import Job, Layer, product_of
from benchmarks.tune.trial import Forced, GpuTrial, kind_of, layer_of
from quantkit_kernels import devices
from quantkit_kernels.tile_choice import KERNELS, forget_tables, wna16_tile
from quantkit_kernels.triton_common import INTERPRETED
from quantkit_kernels.tuning_tables import FOLDER
from quantkit_kernels.wna16 import triton as wna16
from tests.kernels.interpreted import (
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)

N, K = 64, 256
BUCKET = 4


@interpreter
@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture
def force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Forced]:
    """Tensors on the CPU go to the Triton modules, in float16: bfloat16 is wrong there."""
    monkeypatch.setenv(FOLDER, "restored afterwards")
    monkeypatch.setitem(devices.MODULES, "cpu", "triton")
    monkeypatch.setattr(trials, "copies_beyond_cache", lambda nbytes: 2)
    monkeypatch.setattr(trials, "cycle", lambda copies, floor_ms: copies)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.half)
    devices.backend.cache_clear()
    yield Forced(INTERPRETED, tmp_path)
    devices.backend.cache_clear()
    forget_tables()


def job_of(kernel: str, group: int) -> Job:
    return Job(product_of(kernel, Layer(N, K, group)), BUCKET)


def start_of(job: Job) -> Any:
    return KERNELS[job.product.kernel].heuristic(job.product, job.bucket, INTERPRETED)


@interpreter
@in_interpreter
@pytest.mark.parametrize(
    ("kernel", "group"), [("wna16-int4", 32), ("wna16-nf4", 64), ("wna16-e4m3", 128)]
)
def test_right_tiles_pass(kernel: str, group: int, force: Forced) -> None:
    job = job_of(kernel, group)
    trial, start = GpuTrial(job, force, "cpu"), start_of(job)
    assert trial.fault(start) == ""
    assert trial.fault(replace(start, splits=2, stages=2)) == ""


@interpreter
@in_interpreter
def test_the_kernel_gets_the_tile(force: Forced, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("wna16-int4", 128)
    trial, tile = GpuTrial(job, force, "cpu"), replace(start_of(job), splits=2)
    seen = []
    monkeypatch.setattr(
        wna16, "wna16_tile", lambda *shape: seen.append(wna16_tile(*shape)) or seen[-1]
    )
    trial.fault(tile)
    assert seen == [tile]


@interpreter
@in_interpreter
def test_wrong_results_are_refused(force: Forced, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("wna16-int4", 128)
    trial = GpuTrial(job, force, "cpu")
    right = trial._layers[0].value

    def first_token_wrong(y: torch.Tensor) -> torch.Tensor:
        y = right(y).clone()
        y[0] *= 1.1
        return y

    monkeypatch.setattr(trial._layers[0], "value", first_token_wrong)
    assert "of the result, more than" in trial.fault(start_of(job))
    monkeypatch.setattr(trial._layers[0], "value", lambda y: torch.full_like(right(y), torch.nan))
    assert "is off by nan" in trial.fault(start_of(job))


@interpreter
@in_interpreter
def test_what_raises_is_refused(force: Forced, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("wna16-int4", 128)
    trial = GpuTrial(job, force, "cpu")

    def out_of_resources(*args: Any) -> None:
        raise MemoryError("out of resource: shared memory\nmore of it")

    monkeypatch.setattr(wna16, "wna16_tile", out_of_resources)
    expected = "fails: MemoryError: out of resource: shared memory"
    assert trial.fault(start_of(job)) == expected


@interpreter
@in_interpreter
def test_tiles_take_turns(force: Forced) -> None:
    job = job_of("wna16-int4", 128)
    trial, start = GpuTrial(job, force, "cpu"), start_of(job)
    times = trial.race([start, replace(start, splits=2)], 1)
    assert set(times) == {start, replace(start, splits=2)}
    assert min(times.values()) > 0


@pytest.mark.parametrize("kernel", sorted(set(trials.KINDS) & set(KERNELS)))
def test_every_kernel_has_weights(kernel: str) -> None:
    """On the CPU's own backend: what is packed computes what it means."""
    job = job_of(kernel, 128)
    generator = torch.Generator().manual_seed(0)
    weight = kind_of(job.product).random(N, K, generator)
    layer = layer_of(job.product, weight)
    x = layer.prepare(trials.activations(job, generator))
    y, truth = layer.value(layer(x)), layer.seen(x) @ weight.dequantize().T
    assert y.shape == (BUCKET, N)
    # bfloat16 results, and FP8 weights rounded to it.
    assert (y - truth).norm() / truth.norm() <= 6e-3
