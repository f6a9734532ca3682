"""How still a machine was, told from synthetic times."""

from __future__ import annotations

import pytest

from vllm_quantkit.bench.noise import Noise, fixed_work, load_average


def noise(*seconds: float, load: float | None = None) -> Noise:
    return Noise(seconds=seconds, load=load, cores=4)


def test_a_quiet_machine_is_warned_of_nothing():
    quiet = noise(*[0.100, 0.101, 0.099, 0.100, 0.101, 0.100], load=0.3)
    assert quiet.variation < 0.01
    assert quiet.warnings() == ()


def test_a_noisy_one_is():
    found = noise(0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1)
    # Mean 13/90; the squared distances add up to 1/45, over 8.
    assert found.variation == pytest.approx((1 / 360) ** 0.5 / (13 / 90))
    (sentence,) = found.warnings()
    assert "vary by" in sentence


def test_one_that_slows_down_is_told_apart_from_one_that_jumps():
    drifting = noise(*[0.100, 0.101, 0.102, 0.103, 0.104, 0.105, 0.106, 0.107, 0.108])
    assert drifting.drift == pytest.approx(0.107 / 0.101 - 1)
    (sentence,) = drifting.warnings()
    assert "6% slower" in sentence
    faster = noise(*reversed(drifting.seconds))
    assert "faster" in faster.warnings()[0]


def test_other_programs_are_seen_before_the_start():
    assert "3.5 of 4 cores" in noise(0.1, 0.1, load=3.5).warnings()[0]
    assert noise(0.1, 0.1, load=0.9).warnings() == ()


@pytest.mark.parametrize("seconds", [(), (0.1,)])
def test_too_few_times_say_nothing(seconds):
    found = noise(*seconds)
    assert (found.variation, found.drift) == (0.0, 0.0)
    assert found.warnings() == ()


def test_json_has_what_was_computed():
    content = noise(0.1, 0.3).model_dump()
    assert content["variation"] == pytest.approx((0.02**0.5) / 0.2)
    assert content["drift"] == pytest.approx(2.0)


def test_fixed_work_takes_time():
    assert fixed_work() > 0
    load = load_average()
    assert load is None or load >= 0
