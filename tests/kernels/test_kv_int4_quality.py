"""Our 4-bit keys lose less than vLLM's own formats do, and the comparison is a fair one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.kv_peers import (
    HEAD,
    Regime,
    Scheme,
    compare,
    hadamard,
    lloyd_max,
    main,
    make_keys,
    make_sample,
    measure,
    per_token_head,
    rope,
    schemes,
    turboquant_keys,
    turboquant_values,
)

PEERS = ("int4_per_token_head", "turboquant_4bit_nc")


@pytest.mark.parametrize(
    ("regime", "name", "most"),
    [
        # The groups alone: a quarter of a head has a smaller range than a head.
        ("gaussian", "quantkit, uncalibrated", 0.85),
        ("outliers", "quantkit, uncalibrated", 0.85),
        # Shift and scale of other keys at other positions.
        ("outliers", "quantkit, calibrated", 0.70),
        ("bias", "quantkit, calibrated", 0.15),
    ],
)
def test_logit_errors_beside_int4_per_token_head(regime: Regime, name: str, most: float) -> None:
    found, sample = schemes(regime), make_sample(regime, 2)
    own, peer = (measure(found[n], sample) for n in (name, "int4_per_token_head"))
    assert own.logit_rmse <= most * peer.logit_rmse


@pytest.mark.parametrize("regime", ["gaussian", "outliers", "bias"])
def test_every_error_is_below_both_peers(regime: Regime) -> None:
    found = compare(regime, (2, 3, 4, 5))
    own = found["quantkit, calibrated"]
    for name in PEERS:
        peer = found[name]
        assert own.logit_rmse < peer.logit_rmse
        assert own.total_variation < peer.total_variation
        assert own.output_error < peer.output_error


def test_total_variation_of_biased_keys() -> None:
    found, sample = schemes("bias"), make_sample("bias", 2)
    assert measure(found["quantkit, calibrated"], sample).total_variation <= 0.15
    for name in (*PEERS, "quantkit, uncalibrated"):
        # What calibration is for: rotations alone do not save such a layer.
        assert measure(found[name], sample).total_variation > 0.8


def test_the_bias_is_that_of_the_largest_layers() -> None:
    _, _, bias = make_keys("bias", 1, 0)
    assert float(bias.norm()) == pytest.approx(609.3, abs=0.1)
    turned = rope(bias.expand(2, -1), torch.tensor([0, 100]))
    # Slow dimensions: hardly turned over a hundred tokens.
    assert torch.allclose(turned[0], turned[1], atol=1.0)


def test_calibration_sees_other_keys() -> None:
    key = make_sample("outliers", 2).key
    assert not torch.equal(key, make_sample("outliers", 3).key)
    _, spread, bias = make_keys("outliers", 1, 2)
    assert torch.equal(spread, make_keys("outliers", 1, 100)[1])
    assert torch.equal(bias, make_keys("outliers", 1, 100)[2])


def test_lossless_caches_cost_nothing() -> None:
    exact = Scheme(32, lambda x: x, lambda x: x)
    quality = measure(exact, make_sample("gaussian", 2))
    assert (quality.logit_rmse, quality.total_variation, quality.output_error) == (0, 0, 0)


def test_a_constant_added_to_logits_costs_nothing() -> None:
    sample = make_sample("gaussian", 2)
    moved = measure(Scheme(32, lambda x: x + 1, lambda x: x), sample)
    # Products of some tens in float32.
    assert moved.logit_rmse < 1e-4
    assert moved.total_variation < 1e-4


def test_lloyd_max_levels() -> None:
    # J. Max, Quantizing for minimum distortion, 1960, table I, N = 16.
    half = torch.tensor([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733])
    assert torch.allclose(lloyd_max(16), torch.cat([-half.flip(0), half]), atol=1e-3)


def test_per_token_head_is_sixteen_steps_of_a_rotated_head() -> None:
    x = torch.randn(50, HEAD) + 3
    error = (per_token_head(x) - x).norm(dim=-1)
    spread = x.norm(dim=-1) / math.sqrt(HEAD)
    # Rotations keep norms; a step is a fifteenth of a range of some 5 deviations.
    assert bool((error < 0.2 * spread * math.sqrt(HEAD)).all())
    spike = 7 * torch.eye(HEAD)[5:6]
    # It becomes 128 numbers of one size and two signs, exact but for the zero-point.
    assert float((per_token_head(spike) - spike).abs().max()) < 7 / 15


def test_per_token_head_saturates_one_sided_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (HEAD,), generator=generator) * 2.0 - 1
    rotated = 100 + torch.rand(1, HEAD, generator=generator)
    x = (rotated @ hadamard(HEAD)) * signs
    # The range does not hold zero and the zero-point is clamped: all becomes 15 steps of it.
    assert float(per_token_head(x).norm() / x.norm()) < 0.02


def test_turboquant_keeps_norms_and_directions() -> None:
    x = torch.randn(50, HEAD) * torch.logspace(-2, 3, 50)[:, None]
    back = turboquant_keys(x)
    # The norm is a float16.
    assert torch.allclose(back.norm(dim=-1), x.norm(dim=-1), rtol=1e-3)
    # 16 Lloyd-Max levels leave a normal 0.0095 of its power.
    error = (back - x).square().sum(-1) / x.square().sum(-1)
    assert float(error.mean()) == pytest.approx(0.0095, rel=0.1)


def test_turboquant_values_are_sixteen_steps() -> None:
    x = torch.tensor([[-1.0, 0.25, 14.0, 3.0] * 32])
    assert turboquant_values(x)[0, :4].tolist() == [-1.0, 0.0, 14.0, 3.0]


def test_bits_per_value() -> None:
    assert [scheme.bits for scheme in schemes("gaussian").values()] == [
        4.25,
        4.1875,
        4.375,
        4.375,
        4.25,
    ]


def test_the_program_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.kv_peers.SEEDS", (2,))
    monkeypatch.setattr("sys.argv", ["kv_peers", "--json", str(tmp_path / "results.json")])
    main()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    quality = measure(schemes("bias")["quantkit, calibrated"], make_sample("bias", 2))
    assert results["bias"]["quantkit, calibrated"] == pytest.approx(asdict(quality))
    assert printed.count("turboquant_4bit_nc") == 3
    assert f"{quality.total_variation:.3f}" in printed
