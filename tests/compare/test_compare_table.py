"""The table from fixed figures, in all its forms, which agree with each other."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from tests.compare.fakes import interval, quality_of, timing_of
from vllm_quantkit.compare.assembling import assemble
from vllm_quantkit.compare.files import markdown, write_files
from vllm_quantkit.compare.notes import QUICK, doubts_of, notes_below
from vllm_quantkit.compare.result import Bits, Comparison, Facts
from vllm_quantkit.compare.rows import choose_rows
from vllm_quantkit.compare.running import Outcome
from vllm_quantkit.compare.table import for_programs, readable
from vllm_quantkit.compare.work import Served
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.evaluate.tasks import TaskScore

GOLDEN = """\
|  | bits W/A/KV | weights, MiB | of 16-bit | KV, bytes a token | decode, batch of 1 | \
prefill, 448 tokens | perplexity | increase | KL, millinats | same top token | quiz, acc | \
quantised in, s |
|---|--:|--:|--:|--:|---|---|---|--:|--:|--:|--:|--:|
| 16-bit | 16/16/16 | 1.0 | 100% | 1,024 | 102 tokens/s | 1,002 tokens/s | 17.000 |  |  |  | \
0.5 |  |
| FP8 (W8A8) | 8/8/16 | 0.5 | 50% | 1,024 | 2.00x [2.00, 2.00] | 2.00x [2.00, 2.00] | 17.340 | \
+2.00 % [+1.80, +2.20] | 10 [9, 11] | 90.0 % [85.5, 94.5] | 0.5, drop 0.01 [0.009, 0.011] | 12 |
| INT4 AWQ + KV INT4 | 4/16/4,16 | ≈0.2 | 25% | 288 | failed | failed | failed |  |  |  |  | 75 |
"""


def outcomes() -> list[Outcome]:
    base, fp8, awq = (Outcome(row) for row in choose_rows("fp8,awq+kv4"))
    base.served = Served(EngineSpec("MODEL"), {})
    fp8.served = Served(EngineSpec("fp8", "quantkit"), {}, 12.3)
    kv_cache = {"quantkit": {"kv_cache": {"dtype": "int4", "calibration": "KV"}}}
    awq.served = Served(
        EngineSpec("awq", "quantkit", options=(("additional_config", kv_cache),)), {}, 75.0
    )
    sizes = (((16,), (16,), (16,)), 1 << 20), (((8,), (8,), (16,)), 1 << 19), AWQ
    for outcome, ((weights, activations, kv), size) in zip((base, fp8, awq), sizes, strict=True):
        outcome.facts = Facts(
            bits=Bits(weights=weights, activations=activations, kv=kv),
            weight_bytes=size,
            weight_bytes_16bit=1 << 20,
            kv_bytes_per_token=288 if 4 in kv else 1024,
        )
    base.perplexity = quality_of(0.0)
    fp8.quality = fp8.perplexity = quality_of(0.02, warnings=("the text is short.",))
    base.timing, fp8.timing = timing_of(1.0), timing_of(2.0)
    base.tasks, fp8.tasks = ((task(drop),) for drop in (None, 0.01))
    awq.fail("quality", "the engine stopped; its log ends:\nout of memory\nand more")
    awq.fail("speed", "its perplexity is 1e+04, the baseline's 17.")
    return [base, fp8, awq]


AWQ = ((4,), (16,), (4, 16)), 1 << 18


def task(drop: float | None) -> TaskScore:
    return TaskScore(
        task="quiz",
        metric="acc,none",
        score=interval(0.5),
        drop=None if drop is None else interval(drop),
        results="results.json",
    )


@pytest.fixture
def comparison() -> Comparison:
    return assemble(
        outcomes(), model="MODEL", machine="a machine, 2 cores", notes=("Calibrated on text.",)
    )


def test_the_table_as_people_read_it(comparison: Comparison) -> None:
    assert readable(comparison).markdown() + "\n" == GOLDEN


def test_columns_without_any_figure_are_left_out() -> None:
    rows = [Outcome(row) for row in choose_rows("fp8")]
    comparison = assemble(rows, model="MODEL", machine="a machine")
    assert readable(comparison).columns == ("",)


def test_csv_and_json_hold_the_same_figures(comparison: Comparison, tmp_path: Path) -> None:
    write_files(comparison, tmp_path)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [line["row"] for line in lines] == [row["name"] for row in rows]
    line, row = lines[1], rows[1]
    for column, value in {
        "weight_bytes": row["weight_bytes"],
        "weight_share": row["weight_share"],
        "decode_1_tokens_per_s": row["decode"]["1"]["sample"]["median"],
        "decode_1_speed_up": row["decode"]["1"]["ratio"]["median"],
        "prefill_448_speed_up_low": row["prefill"]["448"]["ratio"]["low"],
        "perplexity": row["perplexity"]["value"],
        "increase_high": row["quality"]["increase"]["high"],
        "divergence": row["quality"]["divergence"]["value"],
        "top1_agreement_low": row["quality"]["top1_agreement"]["low"],
        "quiz_acc_drop": row["tasks"][0]["drop"]["value"],
        "quantise_seconds": row["quantise_seconds"],
    }.items():
        assert float(line[column]) == value, column
    assert lines[0]["increase"] == ""
    assert "its log ends: and more" in lines[2]["failures"]


def test_markdown_shows_the_figures_of_the_csv(comparison: Comparison) -> None:
    shown, plain = readable(comparison), for_programs(comparison)
    fp8 = dict(zip(plain.columns, plain.rows[1], strict=True))
    cells = dict(zip(shown.columns, shown.rows[1], strict=True))
    assert cells["increase"].startswith(f"{100 * float(fp8['increase']):+.2f} %")
    assert cells["perplexity"] == f"{float(fp8['perplexity']):.3f}"
    assert cells["decode, batch of 1"].startswith(f"{float(fp8['decode_1_speed_up']):.2f}x")
    assert cells["weights, MiB"] == f"{int(fp8['weight_bytes']) / (1 << 20):.1f}"


def test_the_json_can_be_read_again(comparison: Comparison, tmp_path: Path) -> None:
    write_files(comparison, tmp_path)
    assert Comparison.model_validate_json((tmp_path / "table.json").read_text()) == comparison


def test_every_file_is_there_and_none_is_half(comparison: Comparison, tmp_path: Path) -> None:
    assert write_files(comparison, tmp_path / "new") == ""
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"table.md", "table.csv", "table.json", "table.svg"}
    svg = (tmp_path / "new/table.svg").read_text()
    assert "FP8 (W8A8)" in svg
    assert "KL divergence" in svg


def test_notes_name_text_and_machine(comparison: Comparison) -> None:
    text = markdown(comparison)
    assert "Held-out text: held_out.txt, 8 windows of up to 512 tokens, 4,088" in text
    assert "Calibrated on text." in text
    assert "a machine, 2 cores" in text
    assert "medians over rounds (6)" in text
    assert "- failed: INT4 AWQ + KV INT4, speed: its perplexity is 1e+04" in text


def test_failures_are_one_sentence(comparison: Comparison) -> None:
    (quality, _) = list(comparison.failures())
    assert quality.endswith("the engine stopped; its log ends: and more")


def test_quick_results_say_so(comparison: Comparison) -> None:
    quick = comparison.model_copy(update={"quick": True})
    assert next(iter(notes_below(quick))) == QUICK
    assert QUICK not in list(notes_below(comparison))


def test_few_rounds_are_said_to_be_too_few(comparison: Comparison) -> None:
    rows = outcomes()
    rows[0].timing, rows[1].timing = timing_of(1.0, rounds=2), timing_of(2.0, rounds=2)
    few = assemble(rows, model="MODEL", machine="a machine")
    assert any("too few to tell speeds from noise (2)" in text for text in doubts_of(few))
    assert "2.00x? [" in readable(few).markdown()
    assert not any("too few" in text for text in doubts_of(comparison))


def test_warnings_of_one_row_name_it_and_shared_ones_do_not() -> None:
    rows = outcomes()
    rows[2].quality = rows[2].perplexity = quality_of(0.1, warnings=("the text is short.", "x."))
    shared = assemble(rows, model="MODEL", machine="a machine")
    assert shared.doubts == ("the text is short.", "INT4 AWQ + KV INT4: x.")


def test_the_serve_command_is_what_was_measured(comparison: Comparison) -> None:
    assert comparison.rows[0].serve == "vllm serve MODEL"
    assert comparison.rows[2].serve == (
        "vllm serve awq --quantization quantkit --additional-config "
        """'{"quantkit": {"kv_cache": {"dtype": "int4", "calibration": "KV"}}}'"""
    )
