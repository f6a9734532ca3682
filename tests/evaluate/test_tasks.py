"""lm-eval is asked for the right thing, and its files are read right."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest

from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate import tasks
from vllm_quantkit.evaluate.tasks import TaskPlan, command, read_scores, run_tasks

SPEC = EngineSpec(
    "MODEL", "quantkit-awq", options=(("additional_config", {"quantkit": {"smoothing": 0.5}}),)
)


def results(path: Path, **scores: dict[str, object]) -> Path:
    rising = {"tiny": {"acc": True}, "wiki": {"word_perplexity": False}}
    path.write_text(json.dumps({"results": scores, "higher_is_better": rising}))
    return path


@pytest.fixture
def found(tmp_path: Path) -> Path:
    return results(
        tmp_path / "model.json",
        tiny={"alias": "tiny", "sample_len": 9, "acc,none": 0.5, "acc_stderr,none": 0.03},
        wiki={"word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"},
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return results(
        tmp_path / "base.json",
        tiny={"acc,none": 0.6, "acc_stderr,none": 0.04},
        wiki={"word_perplexity,none": 10.0, "word_perplexity_stderr,none": "N/A"},
    )


def test_a_drop_has_both_errors(found: Path, base: Path) -> None:
    tiny, wiki = read_scores(TaskPlan(names=("tiny", "wiki")), found, base)
    assert (tiny.task, tiny.metric, tiny.score.value) == ("tiny", "acc,none", 0.5)
    assert tiny.base is not None
    assert tiny.drop is not None
    assert tiny.drop.value == pytest.approx(0.1)
    assert tiny.drop.high - tiny.drop.value == pytest.approx(1.96 * 0.05, rel=1e-4)
    assert (tiny.results, tiny.base_results) == (str(found), str(base))
    # A perplexity that rises is a drop too, and "N/A" gives it no interval.
    assert not wiki.higher_is_better
    assert wiki.drop is not None
    assert wiki.drop.value == pytest.approx(2.0)
    assert math.isnan(wiki.drop.low)


def test_without_a_base_there_is_no_drop(found: Path) -> None:
    (tiny,) = read_scores(TaskPlan(names=("tiny",)), found)
    assert tiny.base is None
    assert tiny.drop is None


def test_of_a_tag_all_tasks_are_read(found: Path, base: Path) -> None:
    scores = read_scores(TaskPlan(names=("a_tag",)), found, base)
    assert [score.task for score in scores] == ["tiny", "wiki"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no results of lm-eval"):
        read_scores(TaskPlan(names=("tiny",)), tmp_path / "x.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_scores(TaskPlan(names=("tiny",)), tmp_path / "none.json")


def test_the_command_serves_the_model_as_vllm_would(tmp_path: Path) -> None:
    plan = TaskPlan(names=("mmlu", "gsm8k"), folder=tmp_path, limit=10, fewshot=5)
    words = command(SPEC, plan, tmp_path / "out")
    assert words[:5] == [sys.executable, "-m", "lm_eval", "--model", "vllm"]
    given = {name: behind for name, behind in itertools.pairwise(words) if "--" in name}
    assert json.loads(given["--model_args"]) == {
        "pretrained": "MODEL",
        "quantization": "quantkit-awq",
        "additional_config": {"quantkit": {"smoothing": 0.5}},
    }
    assert given["--tasks"] == "mmlu,gsm8k"
    assert given["--include_path"] == str(tmp_path)
    assert given["--limit"] == "10"
    assert given["--num_fewshot"] == "5"
    assert given["--output_path"] == str(tmp_path / "out")


def test_a_16_bit_model_has_no_quantization(tmp_path: Path) -> None:
    words = command(EngineSpec("BASE"), TaskPlan(names=("x",)), tmp_path)
    assert json.loads(words[words.index("--model_args") + 1]) == {"pretrained": "BASE"}


def stand_in(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in the place of lm-eval's."""
    monkeypatch.setattr(tasks, "require_lm_eval", lambda: None)
    monkeypatch.setattr(tasks, "command", lambda *_: [sys.executable, "-c", code])


def test_the_newest_result_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (out / "m").mkdir(parents=True)
    (out / "m" / "results_1.json").write_text("{}")
    stand_in(f"open({str(out / 'm' / 'results_2.json')!r}, 'w').write('{{}}')", monkeypatch)
    found = run_tasks(SPEC, TaskPlan(names=("x",)), out)
    assert found.name == "results_2.json"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ConnectionError(\"Couldn't reach 'gsm8k' on the Hub\")", "could not be loaded"),
        ("raise ValueError('Tasks not found: x')", r"could not run x(.|\n)*Tasks not found: x"),
        ("pass", "could not run x"),
    ],
)
def test_what_lm_eval_fails_of_is_told(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(code, monkeypatch)
    with pytest.raises(ConfigError, match=message):
        run_tasks(SPEC, TaskPlan(names=("x",)), tmp_path)


def test_without_lm_eval_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'vllm-quantkit\[eval\]'"):
        tasks.require_lm_eval()
