"""How rows are served, what decides their figures, and which text they are judged on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.compare.fakes import quiet_terminal
from vllm_quantkit.compare import commands, workbench
from vllm_quantkit.compare.request import read_request
from vllm_quantkit.compare.rows import BASE, choose_rows
from vllm_quantkit.compare.work import Served
from vllm_quantkit.compare.workbench import RealWorkbench
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.tasks import TaskPlan

DEMO = Path(__file__).parents[2] / "examples/tiny-lm"
TEXT = str(DEMO / "data/held_out.txt")
FEW = {"source": TEXT, "samples": 4, "length": 32, "held_out": 3, "allow_few_samples": True}

Open = Callable[..., RealWorkbench]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Open]:
    """A workbench for the demo model, under the options of the command."""
    with ExitStack() as stack:

        def use(**options: Any) -> RealWorkbench:
            work = tmp_path / f"work-{len(list(tmp_path.iterdir()))}"
            given = {"model": str(DEMO / "bf16"), "work": work, **FEW, **options}
            opened = commands.opened(read_request(given), quiet_terminal()[0])
            found = stack.enter_context(opened).workbench
            assert isinstance(found, RealWorkbench)
            return found

        yield use


def test_the_16_bit_model_is_served_as_it_is(bench: Open) -> None:
    served = bench(tensor_parallel_size=2).serve(BASE)
    assert served.spec == EngineSpec(
        str(DEMO / "bf16"), None, options=(("tensor_parallel_size", 2),)
    )
    assert served.seconds is None


def test_a_checkpoint_of_the_users_is_served_by_the_method_it_names(bench: Open) -> None:
    ours, theirs = choose_rows(f"a={DEMO / 'awq'},b={DEMO / 'awq'}@vllm:awq")[1:]
    assert bench().serve(ours).spec.quantization == "quantkit"
    assert bench().serve(theirs).spec.quantization == "awq"


def test_what_vllm_alone_knows_is_not_made_up(bench: Open) -> None:
    used = bench()
    (row,) = choose_rows("vllm:fp8")[1:]
    facts = used.facts(used.serve(row))
    assert str(facts.bits) == "?/?/16"
    assert facts.weight_bytes is None


@pytest.mark.parametrize(("rows", "kv"), [("kv4", (4,)), (f"mine={DEMO / 'awq'}+kv4", (4,))])
def test_a_cache_of_4_bits_is_calibrated(bench: Open, rows: str, kv: tuple[int, ...]) -> None:
    used = bench()
    (row,) = choose_rows(rows)[1:]
    served = used.serve(row)
    config = dict(served.spec.options)["additional_config"]["quantkit"]["kv_cache"]
    assert config["dtype"] == "int4"
    assert (Path(config["calibration"]) / "kv_cache.json").is_file()
    assert used.facts(served).bits.kv == kv
    assert used.facts(served).kv_bytes_per_token == 4 * 2 * 72, "4 layers, 2 heads, 72 bytes"


def test_rows_differ_in_what_decides_their_figures(bench: Open) -> None:
    used = bench(text=TEXT, windows=2, window_length=32)
    rows = choose_rows(f"quantkit-int8,quantkit-fp8,kv4,mine={DEMO / 'awq'}")
    keys = [json.dumps(used.quality_key(used.serve(row)), default=str) for row in rows]
    assert len(set(keys)) == len(rows)


@pytest.mark.parametrize(
    ("options", "quality", "speed"),
    [
        ({"rounds": 5}, False, True),
        ({"batches": "2"}, False, True),
        ({"windows": 3}, True, False),
        ({"window_length": 48}, True, False),
        ({"tensor_parallel_size": 2}, True, True),
        ({"samples": 5}, False, False),
        ({"out": Path("elsewhere"), "fresh": True}, False, False),
    ],
)
def test_options_change_the_keys_of_what_they_decide(
    bench: Open, options: dict[str, Any], quality: bool, speed: bool
) -> None:
    text = {"text": TEXT, "windows": 2, "window_length": 32}
    one, other = bench(**text), bench(**{**text, **options})
    served = [used.serve(BASE) for used in (one, other)]
    assert (one.quality_key(served[0]) != other.quality_key(served[1])) == quality
    assert (one.speed_key(served[0]) != other.speed_key(served[1])) == speed


def test_without_a_text_rows_are_judged_on_what_calibration_leaves_alone(bench: Open) -> None:
    used = bench()
    sets = used.maker.token_sets(used.maker.calibration)
    assert [list(row) for row in used.windows.rows] == sets.held_out.input_ids.tolist()
    calibrated = {tuple(row) for row in sets.calibration.input_ids.tolist()}
    assert not calibrated & set(used.windows.rows)
    assert used.windows.source == "held_out.txt, held out from calibration"


def test_more_windows_are_held_out_from_calibration_too(bench: Open) -> None:
    used = bench(held_out=5, windows=4, window_length=16)
    assert [len(row) for row in used.windows.rows] == [16] * 4
    assert used.maker.calibration.held_out == 5
    given = {name: value for name, value in FEW.items() if name != "held_out"}
    request = read_request({"model": "MODEL", **given, "windows": 7})
    assert request.calibration.held_out == 7


def results(path: Path, accuracy: float) -> Path:
    score = {"acc,none": accuracy, "acc_stderr,none": 0.01, "alias": "quiz"}
    found = {"results": {"quiz": score}, "higher_is_better": {"quiz": {"acc": True}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return path


def test_drops_in_tasks_are_from_the_16_bit_model(
    bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = bench(tasks="quiz", tasks_limit=5)

    def run_tasks(spec: EngineSpec, plan: TaskPlan, out: Path) -> Path:
        assert plan == TaskPlan(names=("quiz",), limit=5)
        return results(out / "results_1.json", 0.6 if spec.quantization is None else 0.5)

    monkeypatch.setattr(workbench, "run_tasks", run_tasks)
    base = used.tasks("16-bit", Served(EngineSpec("MODEL"), {}), None)
    (score,) = used.tasks("awq", Served(EngineSpec("AWQ", "quantkit"), {}), base).scores
    assert base.scores[0].drop is None
    assert score.drop is not None
    assert score.drop.value == pytest.approx(0.1)
    assert Path(score.results).is_absolute()


def test_tasks_need_lm_eval(bench: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    used = bench(tasks="quiz")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs lm-eval, which is not installed"):
        used.check(frozenset({"tasks"}))
