"""A roofline: how near our kernels and their peers come to the GPU's limits in one layer.

python -m benchmarks.gpu.picture benchmarks/results/gpu_linear.json gpu_linear.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Results, Row

CONTENDERS = {
    "quantkit W4A16 g128": ("C0", "o"),
    "Marlin W4A16 g128": ("C0", "x"),
    "Machete W4A16 g128": ("C0", "+"),
    "quantkit W8A16": ("C1", "o"),
    "Marlin W8A16": ("C1", "x"),
    "quantkit FP8": ("C2", "o"),
    "CUTLASS FP8": ("C2", "x"),
    "quantkit W8A8": ("C3", "o"),
    "CUTLASS W8A8": ("C3", "x"),
    "cuBLAS bf16": ("0.5", "s"),
}
"""Name to colour, by what is quantised, and mark: circles are ours."""


def draw(results: Results, path: Path) -> None:
    """Write a picture: operations a second over operations per byte, both logarithmic.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    _draw_limits(axes, results)
    layer = next((row.problem for row in results.rows if row.op == "linear"), "")
    for name, (colour, mark) in CONTENDERS.items():
        rows = [row for row in results.rows if (row.contender, row.problem) == (name, layer)]
        if rows:
            points = sorted((_intensity(row), row.rate / 1e12) for row in rows)
            style = {"color": colour, "label": name, "fillstyle": "none", "linewidth": 0.7}
            axes.plot(*zip(*points, strict=True), f"{mark}-", **style)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axes.set_title(f"{layer}, {results.machine.partition(';')[0]}", fontsize="small")
    axes.legend(fontsize="small")
    figure.savefig(path)
    plt.close(figure)


def _draw_limits(axes: Any, results: Results) -> None:
    """The copy's bandwidth and cuBLAS's rate in bfloat16, as measured."""
    ceilings = results.ceilings
    intensities = [_intensity(row) for row in results.rows if row.op == "linear"] or [1.0]
    knee = ceilings.product / ceilings.copy
    x = sorted({min(intensities), knee, max(*intensities, 2 * knee)})
    limits = [min(ceilings.copy * i, ceilings.product) / 1e12 for i in x]
    axes.plot(x, limits, color="0.3", linewidth=1, label="copy bandwidth, bf16 product")


def _intensity(row: Row) -> float:
    return row.operations / row.nbytes


if __name__ == "__main__":
    draw(Results.load(Path(sys.argv[1])), Path(sys.argv[2]))
