"""Taking turns, and failing alone."""

from __future__ import annotations

import pytest

from tests.bench.bench_fakes import DEAD, PLAN, FakeEngine
from vllm_quantkit.bench.measures import Decode, Prefill, measures
from vllm_quantkit.bench.plan import BenchPlan
from vllm_quantkit.bench.quantities import Key
from vllm_quantkit.bench.rounds import Rounds, turns
from vllm_quantkit.bench.speeds import calibrate, measure_speeds
from vllm_quantkit.engine import EngineError
from vllm_quantkit.terminal import Terminal

QUIET = Terminal(quiet=True)


def no_tick() -> None:
    pass


class Ask:
    """Notes who was asked; the answer is the number of the question."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def ask(self, subject: str) -> dict[Key, float]:
        self.log.append(f"{self.name}{subject}")
        if subject == "b" and len(self.log) > 9:
            raise EngineError(DEAD)
        return {Key("decode", 1): float(len(self.log))}


def test_turns_go_forwards_and_backwards():
    assert turns(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert turns(["a", "b", "c"], 1) == ["c", "b", "a"]


def test_every_measure_is_asked_of_all_before_the_next():
    log: list[str] = []
    rounds = Rounds([Ask("1", log), Ask("2", log)], lambda *_: 0.25)
    subjects = {"x": "a", "y": "c"}
    rounds.warm_up(subjects, no_tick)
    assert log == ["1a", "1c", "2a", "2c"]
    assert not rounds.values
    log.clear()
    for number in range(2):
        rounds.take(number, subjects, no_tick)
    assert log == ["1a", "1c", "2a", "2c", "1c", "1a", "2c", "2a"]
    assert rounds.seconds == [0.25] * 4
    assert rounds.values["x"][Key("decode", 1)] == [1.0, 3.0, 6.0, 8.0]


def test_one_that_dies_is_asked_no_more():
    log: list[str] = []
    rounds = Rounds([Ask("1", log)], lambda *_: None)
    subjects = {"x": "a", "y": "b"}
    for number in range(8):
        rounds.take(number, subjects, no_tick)
    assert rounds.failures == {"y": DEAD}
    assert set(rounds.samples()) == {"x"}
    assert len(rounds.samples()["x"][Key("decode", 1)].rounds) == 8
    assert log[-1] == "1a"
    assert rounds.seconds == []


def test_speeds_are_those_of_the_engines():
    engines = {"a": FakeEngine(100.0), "b": FakeEngine(250.0)}
    found = measure_speeds(engines, PLAN, QUIET)
    fast = found.speeds["b"]
    assert fast.decode[4].median == pytest.approx(1000.0)
    assert fast.gap[1].median == pytest.approx(0.004)
    assert fast.gap_tail[4].median == pytest.approx(0.008)
    assert fast.prefill[80].median == pytest.approx(2500.0)
    assert fast.first_token.median == pytest.approx(0.5 + 64 / 2500)
    assert fast.first_loaded[80].median == pytest.approx(82 / 250)
    assert fast.mixed[4].median == pytest.approx(1000.0)
    assert fast.token.median == pytest.approx(0.004)
    assert (fast.weight_bytes, fast.cache_tokens) == (3 << 20, 4096)
    assert fast.memory.peak_bytes == 5 << 20
    assert len(fast.decode[1].rounds) == PLAN.rounds
    assert found.noise.seconds == (0.1,) * (len(measures(PLAN)) * PLAN.rounds)


def test_a_dead_engine_leaves_the_others_running():
    engines = {"a": FakeEngine(100.0), "b": FakeEngine(200.0, dies_at="mixed", after=3)}
    found = measure_speeds(engines, PLAN, QUIET)
    assert list(found.speeds) == ["a"]
    assert found.failures == {"b": DEAD}


def test_the_clock_of_another_engine_is_taken_where_the_first_dies():
    engines = {"a": FakeEngine(1.0, dies_at="calibrate"), "b": FakeEngine(1.0)}
    rounds = Rounds(measures(PLAN), calibrate)
    assert calibrate(rounds, engines) == 0.1
    assert list(rounds.failures) == ["a"]
    engines["b"].dies_at = "calibrate"
    assert calibrate(rounds, engines) is None


def test_a_prompt_that_takes_no_time_is_tried_again():
    class Odd(FakeEngine):
        def _prefill(self, rate: float, tokens: int) -> dict[str, float]:
            late = len(self.asked) > 2
            return {"short": 1.0, "full": 2.0 if late else 1.0}

    engine = Odd(1.0)
    assert Prefill(80).ask(engine)[Key("prefill", 80)] == 64.0
    assert engine.asked == ["prefill"] * 3


def test_a_prompt_that_never_takes_time_is_an_error():
    engine = FakeEngine(float("inf"))
    with pytest.raises(EngineError, match="in 3 attempts, a prompt of 80 tokens"):
        Prefill(80).ask(engine)


def test_what_a_plan_leaves_out_is_not_asked():
    plan = BenchPlan(batches=(2,), prompts=(), load=0, mixed=0)
    assert measures(plan) == [Decode(2, plan.tokens)]


def test_a_plan_knows_the_longest_sequence():
    plan = BenchPlan(batches=(4,), tokens=10, context=100, prompts=(70,), load=8, mixed=2)
    assert plan.longest == 100 + 8 + 2 * 10
    assert plan.most_sequences == 9
    assert plan.batch_tokens == 9 * (100 + 8 + 10)
