"""Engines that start, are checked, take turns and end; whichever fails, the others go on."""

from __future__ import annotations

import pytest

from tests.bench.bench_fakes import DEAD, PLAN, FakeEngine, Starter, captured, refusing, specs
from vllm_quantkit.bench.gate import Gate, gate_text
from vllm_quantkit.bench.offline import OfflineBench
from vllm_quantkit.bench.quantities import Key
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.terminal import Terminal

GATE = Gate(text="some words")


def bench(tmp_path, starter: Starter, *labels: str, terminal: Terminal | None = None):
    chosen = terminal or Terminal(quiet=True)
    return OfflineBench(specs(*labels), PLAN, GATE, tmp_path, chosen, starter)


def test_all_at_the_same_time(tmp_path):
    starter = Starter({"a": lambda: FakeEngine(100.0), "b": lambda: FakeEngine(300.0)})
    found = bench(tmp_path, starter, "a", "b")
    found.run_together()
    result = found.result(load=0.1, together=True)

    assert starter.order == ["a", "b"]
    assert all(engine.closed for _, engine in starter.started)
    assert all(engine.asked[0] == "perplexity" for _, engine in starter.started)
    assert result.base == "a"
    assert result.conclusive
    assert result.conditions["together"] is True
    row = result.rows[1]
    assert row.perplexity == 10.0
    assert (row.weight_bytes, row.cache_tokens, row.peak_bytes) == (3 << 20, 4096, 5 << 20)
    decode = row.entry(Key("decode", 4))
    assert decode is not None
    assert decode.ratio is not None
    assert decode.ratio.median == pytest.approx(3.0)
    assert decode.ratio.verdict == "faster"
    first = result.rows[0].entry(Key("decode", 4))
    assert first is not None
    assert first.ratio is None


def test_one_at_a_time_starts_every_engine_in_every_round(tmp_path):
    starter = Starter({"a": lambda: FakeEngine(100.0), "b": lambda: FakeEngine(300.0)})
    starter.may_overlap = False
    found = bench(tmp_path, starter, "a", "b")
    found.run_one_at_a_time()

    assert starter.order == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    perplexities = [engine.asked.count("perplexity") for _, engine in starter.started]
    assert perplexities == [1, 1] + [0] * 8
    samples = found.rounds.samples()
    assert {len(s.rounds) for row in samples.values() for s in row.values()} == {PLAN.rounds}
    assert set(found.memory) == {"a", "b"}


@pytest.mark.parametrize("together", [True, False])
def test_an_engine_that_does_not_start_is_a_row_with_its_reason(tmp_path, together):
    starter = Starter({"a": lambda: FakeEngine(100.0), "b": refusing})
    found = bench(tmp_path, starter, "a", "b")
    found.run_together() if together else found.run_one_at_a_time()
    result = found.result(load=None)

    assert result.rows[0].entries
    assert result.rows[1].entries == ()
    assert result.rows[1].failure == "it stopped:\nValueError: no such kernel"


def test_where_the_first_fails_the_next_is_the_baseline(tmp_path):
    starter = Starter({"a": refusing, "b": lambda: FakeEngine(1.0), "c": lambda: FakeEngine(2.0)})
    found = bench(tmp_path, starter, "a", "b", "c")
    found.run_together()
    result = found.result(load=None)
    assert result.base == "b"
    assert result.rows[2].entry(Key("decode", 1)).ratio.median == 2.0


def test_where_all_fail_there_is_no_result(tmp_path):
    starter = Starter({"a": refusing, "b": lambda: FakeEngine(1.0, dies_at="perplexity")})
    found = bench(tmp_path, starter, "a", "b")
    found.run_together()
    result = found.result(load=None)
    assert result.base is None
    assert not result.conclusive
    assert result.rows[1].failure == DEAD


def test_garbage_has_no_speed(tmp_path):
    starter = Starter(
        {
            "a": lambda: FakeEngine(100.0, perplexity=10.0),
            "close": lambda: FakeEngine(100.0, perplexity=14.0),
            "far": lambda: FakeEngine(900.0, perplexity=20.0),
            "nan": lambda: FakeEngine(900.0, perplexity=float("nan")),
        }
    )
    found = bench(tmp_path, starter, "a", "close", "far", "nan")
    found.run_together()
    assert set(found.rounds.samples()) == {"a", "close"}
    assert "perplexity is 20, the baseline's 10" in found.rounds.failures["far"]
    assert "perplexity is nan" in found.rounds.failures["nan"]
    assert not any("decode" in engine.asked for _, engine in starter.started[2:])


def test_an_engine_that_dies_at_the_end_has_no_speed_either(tmp_path):
    starter = Starter({"a": lambda: FakeEngine(1.0), "b": lambda: FakeEngine(2.0, dies_at="peak")})
    found = bench(tmp_path, starter, "a", "b")
    found.run_together()
    assert found.result(load=None).rows[1].failure == DEAD


def test_an_interrupt_ends_all_engines(tmp_path):
    class Interrupted(FakeEngine):
        def ask(self, op: str, **request: object):
            if op == "mixed":
                raise KeyboardInterrupt
            return super().ask(op, **request)

    starter = Starter({"a": lambda: FakeEngine(1.0), "b": lambda: Interrupted(1.0)})
    found = bench(tmp_path, starter, "a", "b")
    with pytest.raises(KeyboardInterrupt):
        found.run_together()
    assert [engine.closed for _, engine in starter.started] == [True, True]


def test_noise_is_not_taken_for_a_difference(tmp_path):
    starter = Starter(
        {
            "a": lambda: FakeEngine(100.0, wobble=lambda n: 1.0 + 0.3 * (n % 3)),
            "b": lambda: FakeEngine(104.0, wobble=lambda n: 1.0 + 0.3 * (n % 2)),
        }
    )
    found = bench(tmp_path, starter, "a", "b")
    found.run_together()
    result = found.result(load=None)
    assert not result.conclusive
    assert any("decode, batch of 1" in text for text in result.undecided)
    assert all("too noisy to conclude" in text for text in result.undecided)


def test_progress_is_told_by_phases(tmp_path):
    starter = Starter({"a": lambda: FakeEngine(100.0)})
    with captured() as (terminal, out, aside):
        bench(tmp_path, starter, "a", terminal=terminal).run_together()
    assert "timing, 5 rounds" in aside.getvalue()
    assert out.getvalue() == ""


def test_the_text_of_the_check_comes_along(tmp_path):
    assert len(gate_text(None).split()) > 800
    file = tmp_path / "text.txt"
    with pytest.raises(ConfigError, match=r"cannot be read .*give a UTF-8 text file"):
        gate_text(file)
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        gate_text(file)
    file.write_text("words")
    assert gate_text(file) == "words"
