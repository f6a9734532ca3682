"""Whether engines run at the same time, by the memory they take."""

from __future__ import annotations

import pytest

from vllm_quantkit.bench import fitting
from vllm_quantkit.bench.fitting import GIB, Fit, fit
from vllm_quantkit.bench.plan import BenchPlan
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.hardware.device import Device

DEMO = "examples/tiny-lm/bf16"
PLAN = BenchPlan()
SPECS = {
    "16-bit": EngineSpec(DEMO, max_model_len=600),
    "fp8": EngineSpec(DEMO, "quantkit-fp8", max_model_len=600),
}


def device(kind: str, gib: float) -> Device:
    return Device(
        name="test",
        kind=kind,
        memory_bytes=int(gib * GIB),
        bandwidth=1e12,
        capability=(9, 0) if kind == "cuda" else None,
        source="this machine",
    )


@pytest.fixture(autouse=True)
def _cache_of_one_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def test_small_models_run_together_on_a_cpu():
    chosen = fit(SPECS, PLAN, device("cpu", 64), None)
    assert chosen == Fit(True, "all engines fit into memory")
    assert chosen.apply(SPECS["fp8"]) == SPECS["fp8"]


def test_too_little_memory_runs_them_one_at_a_time():
    chosen = fit(SPECS, PLAN, device("cpu", 2), None)
    assert not chosen.together
    assert "2 engines need" in chosen.why
    assert chosen.why.endswith("of 1.8")


def test_what_the_user_wants_is_done():
    assert fit(SPECS, PLAN, device("cpu", 2), True).together
    assert not fit(SPECS, PLAN, device("cpu", 64), False).together


def test_one_engine_needs_no_decision():
    chosen = fit({"16-bit": SPECS["16-bit"]}, PLAN, device("cuda", 1), None)
    assert chosen == Fit(True, "one engine")


def test_a_gpu_is_shared():
    chosen = fit(SPECS, PLAN, device("cuda", 80), None)
    assert chosen.together
    assert chosen.share == 0.45
    assert dict(chosen.apply(SPECS["fp8"]).options) == {"gpu_memory_utilization": 0.45}
    given = EngineSpec(DEMO, options=(("gpu_memory_utilization", 0.2),))
    assert chosen.apply(given) == given


def test_a_gpu_too_small_for_all_caches_is_not_shared():
    chosen = fit(SPECS, PLAN, device("cuda", 1), None)
    assert not chosen.together
    assert chosen.share is None
    assert "tokens, fewer than the" in chosen.why


def test_shares_that_are_given_must_fit():
    specs = {
        name: EngineSpec(DEMO, options=(("gpu_memory_utilization", 0.6),)) for name in ("a", "b")
    }
    chosen = fit(specs, PLAN, device("cuda", 80), None)
    assert not chosen.together
    assert "0.6 exceed the GPU" in chosen.why


def test_a_model_that_cannot_be_weighed_is_tried(monkeypatch: pytest.MonkeyPatch):
    def unknown(model: str) -> None:
        raise CheckpointError("no headers")

    monkeypatch.setattr(fitting, "read_model", unknown)
    chosen = fit(SPECS, PLAN, device("cuda", 80), None)
    assert chosen.together
    assert chosen.share == 0.45
    assert "cannot be told (no headers); if they do not fit, give --one-at-a-time" in chosen.why
