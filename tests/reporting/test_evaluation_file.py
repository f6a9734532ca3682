"""The evaluation inside quantkit_report.json."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reporting.evaluations import EVALUATION, QUALITY
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.evaluate.intervals import Interval
from vllm_quantkit.evaluate.sensitivity import LayerSensitivity
from vllm_quantkit.quantize.output.report import (
    REPORT_FILE,
    Report,
    Resources,
    build_report,
    read_report,
    write_report,
)
from vllm_quantkit.reporting.evaluation import Served, read_evaluation, write_evaluation


@pytest.fixture
def report() -> Report:
    resources = Resources(seconds={}, host_bytes=1, bytes_before=16, bytes_after=5, parameters=8)
    return build_report("models/base", [], resources, device=torch.device("cpu"))


def test_it_is_read_as_it_was_written(tmp_path):
    path = write_evaluation(tmp_path, EVALUATION)

    assert path == tmp_path / REPORT_FILE
    assert read_evaluation(tmp_path) == EVALUATION
    assert list(json.loads(path.read_text())) == ["evaluation"]
    assert [each.name for each in tmp_path.iterdir()] == [REPORT_FILE]


def test_where_nothing_was_measured_there_is_none(report, tmp_path):
    assert read_evaluation(tmp_path) is None
    write_report(report, tmp_path / REPORT_FILE)
    assert read_evaluation(tmp_path) is None


def test_what_quantising_wrote_stays(report, tmp_path):
    write_report(report, tmp_path / REPORT_FILE)
    before = json.loads((tmp_path / REPORT_FILE).read_text())

    write_evaluation(tmp_path, EVALUATION)

    after = json.loads((tmp_path / REPORT_FILE).read_text())
    assert after.pop("evaluation")["machine"] == "a CPU of 2 cores"
    assert before.pop("evaluation") is None
    assert after == before


def test_the_quantiser_reads_and_writes_it_again(report, tmp_path):
    write_report(report, tmp_path / REPORT_FILE)
    write_evaluation(tmp_path, EVALUATION)
    text = (tmp_path / REPORT_FILE).read_text()

    found = read_report(tmp_path / REPORT_FILE)
    write_report(found, tmp_path / REPORT_FILE)

    assert found.evaluation is not None
    assert found.model_copy(update={"evaluation": None}) == report
    assert (tmp_path / REPORT_FILE).read_text() == text


def test_keys_of_other_tools_stay(tmp_path):
    (tmp_path / REPORT_FILE).write_text('{"other": [1, "\\u00e4"], "evaluation": "old"}')

    write_evaluation(tmp_path, EVALUATION)

    assert json.loads((tmp_path / REPORT_FILE).read_text())["other"] == [1, "ä"]
    assert read_evaluation(tmp_path) == EVALUATION


@pytest.mark.parametrize("content", [b"nonsense", b'{"model": ', b"[1]", b'{"a": "\xff"}', b""])
def test_what_is_no_report_is_refused_and_left_alone(content, tmp_path):
    path = tmp_path / REPORT_FILE
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"quantkit_report.json .* move it away"):
        write_evaluation(tmp_path, EVALUATION)

    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == [REPORT_FILE]


def test_an_evaluation_of_another_version_is_named(tmp_path):
    (tmp_path / REPORT_FILE).write_text('{"evaluation": {"quality": {"tokens": "many"}}}')

    with pytest.raises(CheckpointError, match=r"evaluation\.\S+: .*run quantkit eval again"):
        read_evaluation(tmp_path)


class Killed(BaseException):
    """What no `except Exception` catches, as a signal."""


def test_a_process_that_is_killed_before_the_rename_changes_nothing(report, tmp_path, monkeypatch):
    write_report(report, tmp_path / REPORT_FILE)
    before = (tmp_path / REPORT_FILE).read_bytes()

    def killed(*paths: object) -> None:
        raise Killed

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        write_evaluation(tmp_path, EVALUATION)

    assert (tmp_path / REPORT_FILE).read_bytes() == before


def test_a_full_disk_is_said_and_changes_nothing(report, tmp_path, monkeypatch):
    write_report(report, tmp_path / REPORT_FILE)
    before = (tmp_path / REPORT_FILE).read_bytes()

    def full(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text.encode(encoding)[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        write_evaluation(tmp_path, EVALUATION)

    assert (tmp_path / REPORT_FILE).read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [REPORT_FILE]


numbers = st.floats(allow_nan=True, allow_infinity=True)
intervals = st.builds(Interval, value=numbers, low=numbers, high=numbers)
qualities = st.builds(
    QUALITY.model_copy,
    update=st.fixed_dictionaries(
        {"perplexity": intervals, "divergence": intervals, "divergence_tail": numbers}
    ),
)
layers = st.builds(
    LayerSensitivity,
    group=st.text(),
    members=st.lists(st.text()).map(tuple),
    kl=numbers,
    method=st.just("exact restore"),
    bits=st.floats(min_value=0.1, max_value=16),
    is_block=st.booleans(),
)
evaluations = st.builds(
    EVALUATION.model_copy,
    update=st.fixed_dictionaries(
        {
            "quality": st.none() | qualities,
            "by_layer": st.lists(layers, max_size=3).map(tuple),
            "machine": st.text(st.characters(exclude_categories=["Cs"])),
        }
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(evaluations)
def test_any_number_survives(tmp_path, evaluation):
    path = write_evaluation(tmp_path, evaluation)

    # repr, since no number that is not one equals itself
    assert repr(read_evaluation(tmp_path)) == repr(evaluation)
    json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_numbers_that_json_lacks_are_numbers_again(tmp_path):
    broken = QUALITY.model_copy(update={"divergence_tail": math.inf})
    write_evaluation(tmp_path, EVALUATION.model_copy(update={"quality": broken}))

    found = read_evaluation(tmp_path)
    assert found is not None
    assert found.quality is not None
    assert found.quality.divergence_tail == math.inf


def test_what_was_served_comes_from_its_spec():
    spec = EngineSpec("m", "quantkit-awq", 64, (("enforce_eager", True),))

    found = Served.of(spec)

    assert found == Served(
        model="m", quantization="quantkit-awq", max_model_len=64, options={"enforce_eager": True}
    )
