"""Tables, files and verdicts of results that are set by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from vllm_quantkit.bench.noise import Noise
from vllm_quantkit.bench.quantities import QUANTITIES, Key, shown, title
from vllm_quantkit.bench.results import BenchResult, Row, entries
from vllm_quantkit.bench.samples import Sample
from vllm_quantkit.bench.tables import doubts, result_table, sentences
from vllm_quantkit.bench.writing import markdown, write_result
from vllm_quantkit.errors import ConfigError

ONE, GAP, TAIL = Key("decode", 1), Key("gap", 1), Key("gap_tail", 1)
STEADY = [100.0, 101.0, 99.0, 100.0, 100.0, 101.0]
JUMPY = [60.0, 140.0, 80.0, 130.0, 70.0, 110.0]


def samples(rates: list[float]) -> dict[Key, Sample]:
    return {ONE: Sample.of(rates), GAP: Sample.of(1 / rate for rate in rates)}


def result(**rates: list[float]) -> BenchResult:
    base = samples(next(iter(rates.values())))
    rows = [
        Row(
            label=label,
            served={"model": "M"},
            perplexity=9.5,
            weight_bytes=3 << 20,
            entries=entries(samples(values), None if i == 0 else base),
        )
        for i, (label, values) in enumerate(rates.items())
    ]
    return BenchResult(
        machine="a machine",
        base=next(iter(rates)),
        rounds=len(STEADY),
        conditions={"tokens": 8},
        rows=tuple(rows),
        noise=Noise(),
    )


def test_a_difference_beyond_noise_is_concluded():
    found = result(plain=STEADY, fast=[2 * rate for rate in STEADY])
    assert found.conclusive
    assert found.undecided == ()
    assert "| decode, batch of 1, tokens/s | 100.0 | 200.0 (2.00x) |" in markdown(found)
    assert "| between two tokens, batch of 1, median, ms | 10.0 | 5.00 (2.00x) |" in markdown(found)
    assert "| weights, MiB | 3.0 | 3.0 |" in markdown(found)
    assert "Not concluded" not in markdown(found)


def test_one_that_noise_explains_is_not():
    found = result(plain=STEADY, other=JUMPY)
    assert not found.conclusive
    spread = Sample.of(JUMPY).spread
    assert found.undecided[0] == (
        "decode, batch of 1, tokens/s: other against plain: too noisy to conclude: the spread is "
        f"{spread:.0%}, the difference 5%."
    )
    assert "~95.0 (0.95x?)" in markdown(found)
    assert "Not concluded" in markdown(found)


def test_equal_speeds_are_a_conclusion():
    assert result(plain=STEADY, same=list(reversed(STEADY))).conclusive


def test_a_single_scheme_is_concluded_where_it_is_steady():
    assert result(plain=STEADY).conclusive
    lonely = result(plain=JUMPY)
    assert not lonely.conclusive
    assert lonely.undecided[0].startswith(
        "decode, batch of 1, tokens/s: plain: too noisy to conclude: the spread is"
    )


def test_few_rounds_conclude_nothing():
    found = result(plain=STEADY[:3], fast=[300.0] * 3)
    assert found.undecided == (
        "too few to conclude from: 3 rounds, whose range holds the true ratio with 75%. Give "
        "--rounds 5 or more.",
    )


def test_tails_do_not_decide():
    tails = {TAIL: Sample.of(JUMPY)}
    base = Row(label="a", served={}, entries=entries(tails, None))
    other = Row(label="b", served={}, entries=entries({TAIL: Sample.of(STEADY)}, tails))
    found = result(a=STEADY).model_copy(update={"rows": (base, other)})
    assert found.conclusive


def test_of_many_doubts_some_are_told():
    found = result(plain=STEADY, b=JUMPY, c=JUMPY, d=JUMPY)
    told = list(doubts(found))
    assert len(found.undecided) == 6
    assert len(told) == 4
    assert told[-1].startswith("3 more differences")


def test_what_failed_is_a_sentence_below():
    found = result(plain=STEADY)
    failed = Row(label="bad", served={}, failure="it stopped")
    found = found.model_copy(update={"rows": (*found.rows, failed)})
    assert "bad failed: it stopped" in list(sentences(found))
    assert result_table(found).columns == ("", "plain")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (ONE, 12345.6, "12,346"),
        (ONE, 45.12, "45.1"),
        (ONE, 4.512, "4.51"),
        (GAP, 0.0451, "45.1"),
        (Key("ttft", 2.5), 1.5, "1,500"),
    ],
)
def test_values_have_few_digits(key, value, text):
    assert shown(key, value) == text


def test_titles_say_where_a_value_was_measured():
    assert title(Key("prefill", 131072)) == "prefill, 131072 tokens, tokens/s"
    assert title(Key("output", 2.5)) == "output, 2.5 requests/s, tokens/s"
    assert title(Key("ttft", float("inf"))) == "TTFT, all at once, median, ms"
    assert all("{}" in quantity.title for quantity in QUANTITIES.values())


def test_files_appear_together(tmp_path: Path):
    folder = tmp_path / "deep" / "out"
    write_result(result(plain=STEADY, fast=[2 * rate for rate in STEADY]), folder)
    assert {file.name for file in folder.iterdir()} == {"bench.json", "bench.csv", "bench.md"}
    content = json.loads((folder / "bench.json").read_text())
    assert content["conclusive"] is True
    assert content["rows"][1]["entries"][0]["ratio"]["median"] == 2.0
    assert content["rows"][1]["entries"][0]["sample"]["rounds"] == [2 * rate for rate in STEADY]
    rows = list(csv.DictReader((folder / "bench.csv").read_text().splitlines()))
    assert [(r["scheme"], r["quantity"], r["verdict"]) for r in rows] == [
        ("plain", "decode", ""),
        ("plain", "gap", ""),
        ("fast", "decode", "faster"),
        ("fast", "gap", "faster"),
    ]
    assert float(rows[2]["median"]) == 200.0


def test_an_earlier_result_is_kept(tmp_path: Path):
    write_result(result(plain=STEADY), tmp_path / "out")
    with pytest.raises(ConfigError, match="exists: give a new folder"):
        write_result(result(plain=JUMPY), tmp_path / "out")
    assert json.loads((tmp_path / "out/bench.json").read_text())["conclusive"] is True


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"No space left.*make room"):
        write_result(result(plain=STEADY), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
