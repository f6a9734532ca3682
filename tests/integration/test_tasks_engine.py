"""lm-eval runs a task of our own over a quantised model in vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.integration.engines import ENVIRONMENT, ROOT
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.evaluate.tasks import TaskPlan, read_scores, run_tasks

pytest.importorskip("lm_eval", reason="lm-eval, the extra eval, is not installed")
pytestmark = pytest.mark.engine

QUESTIONS = (
    ("The VACUUM command reclaims", (" storage", " banana"), 0),
    ("Python functions are defined with", (" moon", " def"), 1),
    ("The SELECT statement retrieves", (" rows", " cheese"), 0),
    ("SQLite is an embedded", (" horse", " database"), 1),
    ("A foreign key refers to another", (" elephant", " river"), 1),
    ("An index makes a query", (" table", " storage"), 1),
)
"""The last two have no right answer; chance decides them."""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with one task over a file beside it."""
    rows = [dict(zip(("question", "choices", "answer"), row, strict=True)) for row in QUESTIONS]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    description = {
        "task": "tiny_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(description))
    return tmp_path


def test_a_local_task_is_scored(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    options = (("enforce_eager", True), ("max_model_len", 256))
    spec = EngineSpec(str(ROOT / "examples/tiny-lm/awq"), "quantkit-awq", options=options)
    plan = TaskPlan(names=("tiny_questions",), folder=task)
    (score,) = read_scores(plan, run_tasks(spec, plan, tmp_path / "out"))
    assert (score.task, score.metric) == ("tiny_questions", "acc,none")
    assert score.higher_is_better
    assert score.score.value >= 4 / 6, "what the model was trained on is not gibberish to it"
    assert score.score.low < score.score.value
    assert Path(score.results).is_file()
    assert list((tmp_path / "out").rglob("samples_tiny_questions_*.jsonl"))
