"""Seconds of a step: by hand, and what must hold whatever the figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.advise.known_models import LLAMA_8B, write_config
from tests.advise.test_known_cases import CPU
from vllm_quantkit.advise.candidates import SCHEMES, Candidate, candidates, scheme_named
from vllm_quantkit.advise.estimate import Estimate, Estimator
from vllm_quantkit.advise.roofline import (
    Rates,
    RooflineClock,
    Work,
    decode_step,
    prefill_seconds,
    rates_of,
)
from vllm_quantkit.advise.workload import Workload
from vllm_quantkit.footprint import Model, read_model
from vllm_quantkit.hardware import Device, find_device

WORK = Work(
    weights=10**9,
    weight_bytes=2 * 10**9,
    head_weights=0,
    cache_bytes=1000,
    layers=10,
    attention=1000,
)
RATES = Rates(
    bandwidth=1e12, peaks={"bf16": 1e14, "fp8": 2e14}, step_seconds=1e-3, layer_seconds=1e-5
)
PLAIN = scheme_named("16-bit")


def step_seconds(rows: int, rates: Rates = RATES, scheme: str = "16-bit") -> float:
    step = decode_step(
        WORK, scheme_named(scheme), RooflineClock(rates), rates, rows=rows, context=1000
    )
    return step.seconds


def test_few_rows_take_the_time_of_reading_weights() -> None:
    # 2 GB at 1 TB/s, 1 MB of cache, 1 ms and ten layers of 10 us.
    assert step_seconds(1) == pytest.approx(2e-3 + 1e-6 + 1.1e-3)


def test_many_rows_take_the_time_of_products() -> None:
    # 2 * 1000 * 1e9 operations at 1e14 are 20 ms, and half of that in FP8.
    assert step_seconds(1000) == pytest.approx(20e-3 + 1e-3 + 1.1e-3)
    assert step_seconds(1000, scheme="fp8") == pytest.approx(10e-3 + 1e-3 + 1.1e-3)


def test_numbers_that_a_device_does_not_multiply_run_at_the_rate_of_16_bit_floats() -> None:
    assert step_seconds(1000, scheme="smoothquant") == step_seconds(1000)


@pytest.mark.parametrize(("rows", "limit"), [(1, "memory bandwidth"), (1000, "arithmetic")])
def test_a_step_says_what_it_goes_to(rows: int, limit: str) -> None:
    step = decode_step(WORK, PLAIN, RooflineClock(RATES), RATES, rows=rows, context=1)
    assert step.limit == limit


def test_a_prompt_takes_products_and_attention() -> None:
    # 2 * 4096 * 1e9 at 1e14, 2 * 1000 * 4096^2 at 1e14, and two chunks' fixed costs.
    expected = 81.92e-3 + 0.336e-3 + 2 * 1.1e-3
    found = prefill_seconds(WORK, PLAIN, RooflineClock(RATES), RATES, 4096)
    assert found == pytest.approx(expected, rel=1e-3)  # 0.336 is rounded


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(write_config(tmp_path_factory.mktemp("m") / "Llama-3.1-8B", LLAMA_8B))


def estimate(model: Model, device: Device, candidate: Candidate, workload: Workload) -> Estimate:
    rates = rates_of(device)
    found = Estimator(model, device, workload, rates, RooflineClock(rates)).estimate(candidate)
    assert isinstance(found, Estimate)
    return found


ONE = Workload(context=2048, batch=1)
# Of Llama 3.1 8B: weights of the blocks and of the head, and 128 KiB of cache for each of the
# 1,536 + 256 tokens in the middle of an answer.
BYTES_READ = 2 * (6_979_321_856 + 525_336_576) + 131_072 * 1792


@pytest.mark.parametrize(
    ("device", "bandwidth", "fixed"),
    [
        # 80 % of 3,350 GB/s; 0.5 ms and 32 layers of 25 us.
        (find_device("H100"), 0.8 * 3350e9, 1.3e-3),
        # 20 GB/s as measured; 1 ms and 32 layers of 100 us.
        (CPU, 20e9, 4.2e-3),
    ],
    ids=["H100", "CPU"],
)
def test_a_token_of_llama_8b_by_hand(
    llama: Model, device: Device, bandwidth: float, fixed: float
) -> None:
    plain = estimate(llama, device, Candidate(scheme=PLAIN), ONE)
    # The footprint counts a few buffers beside the weights.
    assert plain.token_seconds == pytest.approx(BYTES_READ / bandwidth + fixed, rel=2e-3)
    assert plain.kv_bytes_per_token == 131_072


def test_published_figures_are_taken_with_a_share_and_measured_ones_whole() -> None:
    h100 = find_device("H100")
    assert rates_of(h100).bandwidth == pytest.approx(0.8 * h100.bandwidth)
    assert rates_of(CPU).bandwidth == CPU.bandwidth
    assert rates_of(CPU).peak("bf16") == CPU.peaks["bf16"]


@given(st.floats(1e9, 1e13), st.floats(1, 100), st.integers(1, 4096), st.sampled_from(SCHEMES))
def test_more_bandwidth_is_never_slower(bandwidth, more, rows, scheme) -> None:
    slow, fast = (
        RATES.model_copy(update={"bandwidth": value}) for value in (bandwidth, bandwidth * more)
    )
    assert step_seconds(rows, fast, scheme.name) <= step_seconds(rows, slow, scheme.name)


@given(st.floats(1e12, 1e15), st.floats(1, 100), st.integers(1, 4096))
def test_a_higher_peak_is_never_slower(peak, more, rows) -> None:
    slow, fast = (
        RATES.model_copy(update={"peaks": {"bf16": value}}) for value in (peak, peak * more)
    )
    assert step_seconds(rows, fast) <= step_seconds(rows, slow)


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_more_sequences_never_make_a_step_shorter(rows: int, more: int) -> None:
    assert step_seconds(rows) <= step_seconds(rows + more)


@pytest.mark.parametrize("name", ["H100", "A10", "L40S"])
def test_fewer_bits_never_take_more_memory(llama: Model, name: str) -> None:
    device = find_device(name)
    found = [
        (one.scheme.weight_bits, one.cache, estimate(llama, device, one, ONE))
        for one in candidates()
    ]
    for bits, _, first in found:
        for fewer, _, second in found:
            if fewer < bits:
                assert second.weight_bytes < first.weight_bytes
    caches = {cache: one.kv_bytes_per_token for _, cache, one in found}
    assert caches["int4"] < caches["fp8"] < caches["auto"]


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_faster_memory_gives_more_tokens(llama: Model, batch: int) -> None:
    h100 = find_device("H100")
    twice = h100.model_copy(update={"bandwidth": 2 * h100.bandwidth})
    workload = Workload(context=2048, batch=batch)
    for one in candidates():
        slow = estimate(llama, h100, one, workload)
        assert estimate(llama, twice, one, workload).tokens_per_second > slow.tokens_per_second
