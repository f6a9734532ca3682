"""A job on a GPU: random weights that no cache holds, the correctness gate, and the clock."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.gpu.contender import EXACT, ROUNDED, Layer
from benchmarks.gpu.inputs import checked_rows, poisoned, relative_error
from benchmarks.gpu.ours import LlmInt8, ScaledProduct, WeightOnly
from benchmarks.gpu.problems import Kind
from benchmarks.gpu.timing import copies_beyond_cache, cycle, race, record
from benchmarks.tune.jobs import Job
from benchmarks.tune.search import GpuLostError
from quantkit_kernels.act_quant import RowQuantizer
from quantkit_kernels.tile_choice import LLM_INT8, forget_tables
from quantkit_kernels.tuning import Device
from quantkit_kernels.tuning_tables import FOLDER, Product, file_name, render_table

FASTEST_MEMORY = 8e12
"""Bytes per second that no GPU exceeds: for how many calls are timed together at least."""

OUTLIER_EVERY, OUTLIER = 100, 10.0
"""Channels of x with outliers where LLM.int8 looks for them, and how much larger they are."""

KINDS = {
    "wna16-int2": Kind("", 2, symmetric=False),
    "wna16-int4": Kind("", 4, symmetric=False),
    "wna16-int8": Kind("", 8, symmetric=False),
    "wna16-e4m3": Kind("", 8, code_type="e4m3"),
    "wna16-nf4": Kind("", 4, code_type="nf4"),
    "wna16-fp4": Kind("", 4, code_type="fp4"),
    "scaled-int8": Kind("", 8),
    "scaled-e4m3": Kind("", 8, code_type="e4m3"),
    LLM_INT8: Kind("", 8),
}
"""Kernels that can be tuned to their weights. Of E5M2 there are no checkpoints to speak of."""


class Forced:
    """Lets the kernels cut a job by a given tile: through a table of its own, as in serving."""

    def __init__(self, device: Device, folder: Path) -> None:
        """Every table in `folder` and in the user's own are out of use from here on."""
        self._device, self._file = device, folder / file_name(device.name)
        os.environ[FOLDER] = str(folder)

    def __call__(self, job: Job, tile: Any) -> None:
        """From the next launch on."""
        table = render_table(self._device.name, "a trial", {(job.product, job.bucket): tile})
        self._file.write_text(table)
        forget_tables()


class GpuTrial:
    """See `search.Trial`.

    Args:
        job: what is tuned.
        force: lets the kernels cut it by a tile.
        place: the torch device.
    """

    def __init__(self, job: Job, force: Callable[[Job, Any], None], place: str = "cuda") -> None:
        self._force = partial(force, job)
        generator = torch.Generator(place).manual_seed(0)
        kind, product = kind_of(job.product), job.product
        weight = kind.random(product.n, product.k, generator)
        layer = layer_of(product, weight)
        count = copies_beyond_cache(int(kind.nbytes(product.n, product.k)))
        self._layers = [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]
        x = activations(job, generator)
        self._inputs = layer.prepare(x)
        self._rows = checked_rows(job.bucket, x.device)
        self._truth = layer.seen(self._inputs)[self._rows] @ weight.dequantize().T
        self._floor_ms = 1e3 * kind.nbytes(product.n, product.k) / FASTEST_MEMORY
        self._limit = ROUNDED if product.kernel.startswith("wna16") else EXACT
        self._spills: int | None = None

    def fault(self, tile: Any) -> str:
        """Whether it runs, keeps its values in registers and is right, on poisoned memory.

        Raises:
            GpuLostError: the GPU answers no more.
        """
        self._force(tile)
        layer = self._layers[0]
        try:
            with launched() as kernels, poisoned():
                y = layer.value(layer(self._inputs))
                error = relative_error(y[self._rows], self._truth)
        except Exception as reason:  # whatever a compiler or driver raises
            lines = str(reason).strip().splitlines() or [""]
            told = f"fails: {type(reason).__name__}: {lines[0]}"
            if gpu_is_lost():
                raise GpuLostError(tile, told) from reason
            return told
        spills = sum(kernel.n_spills for kernel in kernels)
        if self._spills is None:
            self._spills = spills
        if spills > self._spills:
            return f"spills {spills} registers, the heuristic's tile {self._spills}"
        if not error <= self._limit:
            return f"is off by {error:.1e} of the result, more than {self._limit:.1e}"
        return "" if bool(y.isfinite().all()) else "leaves results unwritten"

    def race(self, tiles: Sequence[Any], rounds: int) -> Mapping[Any, float]:
        """Median milliseconds, as CUDA graphs over weights that no cache holds, in turns."""
        calls = [partial(layer, self._inputs) for layer in self._layers]
        field = {}
        for tile in tiles:
            self._force(tile)
            field[str(tile)] = record(cycle(calls, self._floor_ms))
        times = race(field, rounds)
        return {tile: times[str(tile)].median for tile in tiles}


def kind_of(product: Product) -> Kind:
    """The weights of a product."""
    kind, group = KINDS[product.kernel], product.group
    return Kind(
        kind.name,
        kind.bits,
        group or None,
        kind.symmetric,
        kind.code_type,
        block=product.kernel.startswith("scaled") and group > 0,
    )


def layer_of(product: Product, weight: Any) -> Layer:
    """The packed weight; its 8-bit rows are made before the clock runs."""
    if product.kernel == LLM_INT8:
        return LlmInt8(weight)
    if not product.kernel.startswith("scaled"):
        return WeightOnly(weight)
    code = "int8" if product.kernel == "scaled-int8" else "e4m3"
    quantizer = RowQuantizer(code, product.group) if product.group else RowQuantizer(code)
    return ScaledProduct(weight, quantizer)


def activations(job: Job, generator: torch.Generator) -> Tensor:
    """bfloat16 x [bucket, K]."""
    x = torch.randn(job.bucket, job.product.k, generator=generator, device=generator.device)
    if job.product.kernel == LLM_INT8:
        x[:, ::OUTLIER_EVERY] += OUTLIER
    return x.bfloat16()


@contextmanager
def launched() -> Iterator[list[Any]]:
    """The compiled kernels that are launched inside."""
    original, found = JITFunction.run, []

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **kwargs)
        found.append(kernel)
        return kernel

    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = original


def gpu_is_lost() -> bool:
    """True where nothing can run on the GPU any more: some errors outlive their cause."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
