"""The report of a run, and the section it puts into the model's card."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.quantize.calibration import CalibrationOptions, TokenSet, TokenSets
from vllm_quantkit.quantize.output.model_card import BEGIN, END, card_section, with_section
from vllm_quantkit.quantize.output.records import BlockRecord, LayerRecord
from vllm_quantkit.quantize.output.report import (
    CalibrationSummary,
    Quality,
    Report,
    Resources,
    build_report,
    peak_device_bytes,
    peak_host_bytes,
    read_report,
    render_lines,
    write_report,
)

CPU = torch.device("cpu")


def layer(name: str, error: float, **given: object) -> LayerRecord:
    fields = {"scheme": "4 bits, group 128", "method": "awq + mse", "weight_error": 0.1}
    return LayerRecord.model_validate({"name": name, "output_error": error, **fields, **given})


BLOCKS = (
    BlockRecord(
        index=0,
        layers=(layer("a.q", 0.02, disagreement=0.05), layer("a.o", 0.08, note="It fell back.")),
        coverage={"a.mlp.experts": (3, 0, 7)},
    ),
    BlockRecord(
        index=1,
        layers=(
            layer("b.q", 0.04, disagreement=0.3, tokens=640),
            layer("b.o", 0.0, output_error=None, scheme="8 bits, per channel", method="nearest"),
        ),
    ),
)
QUALITY = Quality(
    tokens=1234,
    perplexity_before=8.0,
    perplexity_after=8.2,
    divergence_mean=0.0123,
    divergence_tail=0.25,
    top1_agreement=0.971,
)
RESOURCES = Resources(
    seconds={"calibrate": 1.5, "round": 2.25},
    host_bytes=10**9,
    bytes_before=2_000_000_000,
    bytes_after=600_000_000,
    parameters=10**9,
)


def token_sets() -> TokenSets:
    ids = torch.arange(20).view(4, 5)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    held_out = TokenSet(ids[:2] + 50, None, "chats.jsonl")
    return TokenSets(TokenSet(ids, mask, "chats.jsonl"), held_out, ("Few samples.",))


def summary() -> CalibrationSummary:
    options = CalibrationOptions(samples=4, allow_few_samples=True, packing="padded", seed=7)
    return CalibrationSummary.of(options, token_sets())


@pytest.fixture
def report() -> Report:
    return build_report(
        "models/base", BLOCKS, RESOURCES, device=CPU, quality=QUALITY, calibration=summary()
    )


def test_a_report_is_read_as_it_was_written(report, tmp_path):
    write_report(report, tmp_path / "report.json")

    assert read_report(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    text = (tmp_path / "report.json").read_text()
    keys = re.findall(r'^  "(\w+)"', text, re.MULTILINE)
    assert keys == sorted(Report.model_fields)
    again = tmp_path / "again.json"
    write_report(read_report(tmp_path / "report.json"), again)
    assert again.read_text() == text


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_json_lacks_survive(value, report, tmp_path):
    broken = QUALITY.model_copy(update={"perplexity_after": value})
    write_report(report.model_copy(update={"quality": broken}), tmp_path / "report.json")

    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    found = read_report(tmp_path / "report.json").quality
    assert found is not None
    assert repr(found.perplexity_after) == repr(value)


def test_another_file_is_no_report(tmp_path):
    for text in ("{}", "nonsense", '{"model": 3}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"report.json is no report of this version"):
            read_report(tmp_path / "report.json")


def test_what_a_report_is_made_of(report):
    assert report.scheme == {"4 bits, group 128": 3, "8 bits, per channel": 1}
    assert [record.name for record in report.layers] == ["a.q", "a.o", "b.q", "b.o"]
    assert report.unstable == {"b.q": 0.3}
    assert report.notes == {"a.o": "It fell back."}
    assert report.coverage == {"a.mlp.experts": (3, 0, 7)}
    assert report.bits_per_weight == 4.8
    assert report.not_measured == ""
    assert report.versions.keys() == {
        "vllm-quantkit",
        "torch",
        "transformers",
        "compressed-tensors",
        "python",
        "device",
    }
    assert report.versions["device"].startswith("cpu (")


def test_the_summary_of_calibration_data():
    found, sets = summary(), token_sets()

    assert (found.samples, found.tokens, found.length) == (4, 18, 5)
    assert (found.held_out_samples, found.held_out_tokens) == (2, 10)
    assert (found.packing, found.seed, found.source) == ("padded", 7, "chats.jsonl")
    assert found.fingerprint == sets.calibration.fingerprint
    assert found.held_out_fingerprint == sets.held_out.fingerprint
    assert found.warnings == ("Few samples.",)


def test_a_report_cannot_be_changed(report):
    with pytest.raises(ValidationError):
        report.model = "another"
    with pytest.raises(ValidationError):
        Resources.model_validate({**RESOURCES.model_dump(), "parameters": 0})


def test_memory_is_measured_where_it_can_be():
    before = peak_host_bytes()
    held = torch.ones(16 << 20)

    # A process with PyTorch in it takes more than 64 MiB, and the peak never falls.
    assert peak_host_bytes() >= before > 64 << 20
    assert len(held) == 16 << 20
    assert peak_device_bytes(CPU) is None


def test_the_lines_name_the_worst_layers_first(report):
    lines = list(render_lines(report, worst=2))

    assert lines[:3] == [
        "3 layers: 4 bits, group 128",
        "1 layers: 8 bits, per channel",
        "weights: 2,000,000,000 -> 600,000,000 bytes, 4.80 bits per weight",
    ]
    assert "held-out perplexity over 1,234 tokens: 8.000 -> 8.200 (+2.50%)" in lines
    assert "KL divergence: mean 0.0123, 99th percentile 0.25; same first choice 97.1%" in lines
    assert "warning: Few samples." in lines
    errors = [line for line in lines if " error " in line]
    # b.o has no output error, so its weight's counts.
    assert errors == [
        "b.o  weight error 10.00%  nearest",
        "a.o  output error 8.00%  awq + mse",
    ]
    (unstable,) = [line for line in lines if line.startswith("unstable")]
    assert "in 1 of 4 layers" in unstable
    assert "more than 10% apart, most in b.q (35%): give more samples" in unstable
    assert lines[-1] == "note: a.o: It fell back."


def test_a_layer_whose_error_is_no_number_is_the_worst():
    blocks = [BlockRecord(index=0, layers=(layer("fine", 9.0), layer("broken", math.nan)))]
    lines = list(render_lines(build_report("base", blocks, RESOURCES, device=CPU), worst=1))

    assert any(line.startswith("broken  output error nan%") for line in lines)
    assert not any(line.startswith("fine") for line in lines)


def test_notes_beyond_the_limit_are_counted():
    layers = tuple(layer(f"layer{index}", 0.0, note="Odd.") for index in range(5))
    report = build_report("base", [BlockRecord(index=0, layers=layers)], RESOURCES, device=CPU)

    lines = list(render_lines(report, worst=2))

    assert lines[-1] == "note: 3 more layers have notes in quantkit_report.json"


def test_what_was_not_measured_is_said():
    report = build_report("base", BLOCKS, RESOURCES, device=CPU, not_measured="no text was given")

    assert "held-out quality: not measured, because no text was given" in list(render_lines(report))
    section = card_section(report)
    assert "Not measured, because no text was given." in section
    assert "None: the method rounds weights without data." in section


def test_the_section_says_what_a_user_needs(report):
    section = card_section(report)

    assert section.startswith(BEGIN)
    assert section.rstrip().endswith(END)
    for part in (
        "Quantised from `models/base` with vllm-quantkit",
        "| 4 bits, group 128 | 3 | awq + mse |",
        "Weights: 0.60 GB instead of 2.00 GB, 4.80 bits per weight.",
        "| perplexity | 8.000 | 8.200 (+2.50%) |",
        "| KL divergence, mean | 0 | 0.0123 |",
        "| same most likely token | 100% | 97.1% |",
        summary().fingerprint,
        summary().held_out_fingerprint,
        "- Few samples.",
        "vllm serve",
        "cannot be fully fine-tuned",
        "long reasoning",
        "Measure your own task",
    ):
        assert part in section


FRONTS = {
    "": {},
    "license: mit\n": {"license": "mit"},
    "tags: [chat, 'code']\nlicense: mit\n": {"tags": ["chat", "code"], "license": "mit"},
    "tags: []\n": {"tags": []},
    "tags: [chat,\n  code]\n": {"tags": ["chat", "code"]},
    "tags:\n- chat\n- code\nlicense: mit\n": {"tags": ["chat", "code"], "license": "mit"},
    "tags:\n  # kinds\n  - chat\nlicense: mit\n": {"tags": ["chat"], "license": "mit"},
    "tags: chat\n": {"tags": ["chat"]},
    "tags:\nlicense: mit\n": {"tags": [], "license": "mit"},
    "base_model:\n- meta/older\nlicense: mit\n": {"license": "mit"},
    "base_model: meta/older\nbase_model_relation: finetune\n": {},
    "language: no\nvalue: 0.5 # kept\n": {"value": 0.5},
}
"""Front matter, and what of it must be found afterwards."""


@pytest.mark.parametrize("front", FRONTS)
def test_front_matter_is_kept_and_gains_what_the_hub_reads(front, report):
    yaml = importlib.import_module("yaml")
    readme = f"---\n{front}---\n# Base\n\nText.\n" if front else "# Base\n\nText.\n"

    card = with_section(readme, card_section(report), "meta/base")

    _, found, body = card.split("---\n", 2)
    read, expected = yaml.safe_load(found), dict(FRONTS[front])
    tags = expected.pop("tags", [])
    assert set(read.pop("tags")) == {*tags, "vllm-quantkit"}
    assert read.pop("base_model") == "meta/base"
    assert read.pop("base_model_relation") == "quantized"
    assert expected.items() <= read.items()
    assert body == f"\n{card_section(report)}\n# Base\n\nText.\n"
    # What YAML would read as something else is left as it was written.
    assert front != "language: no\nvalue: 0.5 # kept\n" or card.startswith(f"---\n{front}")


@pytest.mark.parametrize("base_model", [None, "meta/base"])
@pytest.mark.parametrize("front", FRONTS)
def test_a_section_replaces_a_former_one(front, base_model, report):
    readme = f"---\n{front}---\n# Base\n\n---\n\nA rule, and `code`.\n" if front else ""
    other = report.model_copy(update={"quality": None, "not_measured": "of a reason"})

    first = with_section(readme, card_section(other), base_model)
    second = with_section(first, card_section(report), base_model)

    assert first.count(BEGIN) == second.count(BEGIN) == second.count(END) == 1
    assert "of a reason" in first
    assert "of a reason" not in second
    assert second == with_section(readme, card_section(report), base_model)
    assert second == with_section(second, card_section(report), base_model)
    assert second.count("A rule, and `code`.") == (1 if front else 0)


def test_an_unknown_base_model_leaves_its_keys_alone(report):
    readme = "---\nbase_model: meta/older\n---\nText.\n"

    card = with_section(readme, card_section(report))

    assert card.startswith("---\nbase_model: meta/older\ntags:\n- vllm-quantkit\n---\n")
    assert "base_model_relation" not in card


@pytest.mark.parametrize("marker", [BEGIN, END])
def test_a_marker_that_lost_its_partner_takes_no_text_with_it(marker, report):
    card = with_section(f"Before.\n{marker}\nAfter.\n", card_section(report))

    assert card.count(BEGIN) == card.count(END) == 1
    assert "Before.\nAfter.\n" in card
    assert with_section(card, card_section(report)) == card


def test_windows_line_ends_are_no_obstacle(report):
    card = with_section("\ufeff---\r\nlicense: mit\r\n---\r\nText.\r\n", card_section(report))

    assert card.startswith("---\nlicense: mit\ntags:\n- vllm-quantkit\n---\n")
    assert card.endswith("Text.\n")


def test_the_demos_own_card_takes_a_section(report):
    text = (Path(__file__).parents[2] / "README.md").read_text()

    card = with_section(text, card_section(report), "me/demo")

    assert card.endswith(text.lstrip("\n"))
