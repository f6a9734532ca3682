"""The held-out text is found, rebuilt and verified; calibration text is warned of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vllm_quantkit.errors import CheckpointError, ConfigError
from vllm_quantkit.evaluate.origin import find_base, read_origin
from vllm_quantkit.evaluate.text import TextOptions, load_windows
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.quantize.calibration import CalibrationOptions, load_token_sets
from vllm_quantkit.quantize.output.report import REPORT_FILE

DEMO = Path(__file__).parents[2] / "examples/tiny-lm"
CALIBRATION, HELD_OUT = DEMO / "data/calibration.txt", DEMO / "data/held_out.txt"


def loaded(folder: Path, **options: object) -> Windows:
    return load_windows(folder, read_origin(folder), TextOptions(**options))


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's checkpoint, far from its text and its base."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(DEMO / "awq", tmp_path / "far" / "away" / "awq")


def test_the_held_out_set_of_the_report_is_made_anew() -> None:
    """Found beside the model, and verified; here against what quantising holds out."""
    windows = loaded(DEMO / "awq")
    options = CalibrationOptions(
        source=str(CALIBRATION), samples=128, length=512, held_out=12, seed=0
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "bf16")
    expected = load_token_sets(options, tokenizer, 1024).held_out.input_ids
    assert [list(row) for row in windows.rows] == expected.tolist()
    assert windows.source == "calibration.txt, held out from calibration"
    assert not windows.warnings


def test_naming_the_calibration_text_gives_its_held_out_set(away: Path) -> None:
    expected = loaded(DEMO / "awq").rows
    assert loaded(away, source=str(CALIBRATION)).rows == expected
    assert loaded(away, source=str(CALIBRATION), windows=3).rows == expected[:3]


@pytest.mark.parametrize("options", [{"windows": 20}, {"length": 256}, {"seed": 1}])
def test_other_windows_of_the_calibration_text_are_warned_of(options: dict[str, int]) -> None:
    windows = loaded(DEMO / "awq", **options)
    assert "calibration.txt calibrated this model" in windows.warnings[-1]


def test_another_text_is_cut_in_seeded_order(away: Path) -> None:
    first = loaded(away, source=str(HELD_OUT), windows=4, length=128)
    assert first.length == 128
    assert len(first.rows) == 4
    assert first.source == "held_out.txt"
    assert not first.warnings
    other = loaded(away, source=str(HELD_OUT), windows=4, length=128, seed=1)
    assert other.fingerprint != first.fingerprint


def test_an_engine_has_room_for_its_own_token(away: Path) -> None:
    assert loaded(away, source=str(HELD_OUT)).length == 1023
    long = loaded(away, source=str(HELD_OUT), length=4096)
    assert long.length == 1023
    assert "windows have 1023 tokens, not 4096" in long.warnings[0]


def test_no_text_is_an_error_that_says_what_to_pass(away: Path) -> None:
    with pytest.raises(ConfigError, match=r"calibrated on calibration\.txt, which is neither here"):
        loaded(away)
    with pytest.raises(ConfigError, match="Pass --text FILE"):
        loaded(DEMO / "bf16")


def test_too_little_text_is_an_error(away: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Very little. " * 50)
    with pytest.raises(ConfigError, match="gives 0 windows of 1023 tokens, but 2 are needed"):
        loaded(away, source=str(short))


def test_a_calibration_text_that_changed_is_noticed(away: Path) -> None:
    changed = away.parent / "calibration.txt"
    changed.write_text(CALIBRATION.read_text().replace("the", "a"))
    with pytest.raises(ConfigError, match="not the text that the model was calibrated on any more"):
        loaded(away)


def test_a_broken_report_is_named(away: Path) -> None:
    (away / REPORT_FILE).write_text('{"calibration": {"source": 3}}')
    with pytest.raises(CheckpointError, match="not as this version writes it"):
        read_origin(away)
    (away / REPORT_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_origin(away)


def test_the_base_is_what_the_report_names(away: Path) -> None:
    demo = DEMO / "awq"
    assert find_base(read_origin(demo), str(demo), None, False) == (str(DEMO / "bf16"), "")
    found, why = find_base(read_origin(away), str(away), None, False)
    assert found == ""
    assert "names no 16-bit model that is here" in why
    assert find_base(read_origin(away), str(away), str(DEMO / "bf16"), False)[0]


def test_a_hub_base_that_cannot_be_loaded_is_said(
    away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = json.loads((away / REPORT_FILE).read_text())
    report["base_model"] = "no/such-model"
    (away / REPORT_FILE).write_text(json.dumps(report))
    found, why = find_base(read_origin(away), str(away), None, False)
    assert found == ""
    assert "'no/such-model' is neither a folder" in why
    with pytest.raises(CheckpointError, match="neither a folder"):
        find_base(read_origin(away), str(away), "no/other-model", False)


def test_a_16_bit_model_is_compared_with_itself_only_where_it_changes() -> None:
    origin = read_origin(DEMO / "bf16")
    assert find_base(origin, "model", None, True) == ("model", "")
    assert find_base(origin, "model", None, False)[0] == ""
