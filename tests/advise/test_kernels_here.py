"""Kernels timed on this machine: interpolation by hand, and that something is timed."""

from __future__ import annotations

import pytest

from vllm_quantkit.advise import kernels_here
from vllm_quantkit.advise.candidates import scheme_named
from vllm_quantkit.advise.kernels_here import KernelSpeed, MeasuredClock, measure_kernels
from vllm_quantkit.advise.roofline import Rates
from vllm_quantkit.spec import LayerShape

SPEEDS = tuple(
    KernelSpeed(scheme=scheme, rows=rows, seconds_per_weight=seconds)
    for scheme, rows, seconds in (
        ("16-bit", 1, 4e-10),
        ("16-bit", 16, 16e-10),
        ("awq", 1, 1e-10),
        ("awq", 16, 2e-10),
    )
)
CLOCK = MeasuredClock(SPEEDS, Rates(bandwidth=1, peaks={}))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, 4e-10),
        (16, 16e-10),
        (4, 8e-10),  # half way from 1 to 16 on a logarithmic scale, and from 4 to 16
        (160, 160e-10),  # ten times the rows of the last
    ],
)
def test_times_lie_on_lines_between_what_was_measured(rows: int, expected: float) -> None:
    plain = scheme_named("16-bit")
    assert CLOCK.seconds(plain, 1000, 0, rows) == pytest.approx(1000 * expected)


def test_schemes_of_one_kernel_share_its_time() -> None:
    awq, int4 = (scheme_named(name) for name in ("awq", "int4"))
    assert CLOCK.seconds(int4, 1000, 0, 1) == CLOCK.seconds(awq, 1000, 0, 1)
    assert CLOCK.seconds(awq, 1000, 0, 1) == pytest.approx(1e-7)


def test_a_small_layer_of_each_scheme_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_here, "SECONDS", 1e-4)
    monkeypatch.setattr(kernels_here, "CACHE_BYTES", 1 << 16)
    schemes = [scheme_named(name) for name in ("awq", "gptq", "smoothquant")]
    found = measure_kernels(LayerShape(out_features=256, in_features=128), (1, 4, 4), schemes)
    assert {(one.scheme, one.rows) for one in found} == {
        (name, rows) for name in ("16-bit", "awq", "smoothquant") for rows in (1, 4)
    }
    assert all(one.seconds_per_weight > 0 for one in found)
