"""From prompts to a result, with engines of a toy model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.long_generation.toy_engine import LIKELY, ToyEngine
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import CheckpointError, ConfigError
from vllm_quantkit.long_generation import base_run, measure
from vllm_quantkit.long_generation.explain import explain
from vllm_quantkit.long_generation.measure import measure_against, record_base, writing_spec
from vllm_quantkit.long_generation.plan import LongPlan, fit
from vllm_quantkit.long_generation.prompts import PromptSet
from vllm_quantkit.long_generation.result import LongGeneration

PROMPTS = PromptSet(rows=((0, 1), (2,), (5, 6, 0)), source="toy.txt", ends=False)
PLAN = LongPlan(prompts=3, tokens=40)


@pytest.fixture(autouse=True)
def _toy_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ToyEngine.started.clear()
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    for module in (base_run, measure):
        monkeypatch.setattr(module, "Engine", ToyEngine)
        monkeypatch.setattr(measure, "backend_version", lambda backend: "toy 1")


@pytest.fixture
def spec(tmp_path: Path):
    """The spec of a toy model by its name."""

    def make(name: str) -> EngineSpec:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"vocab_size": 8}))
        return EngineSpec(str(folder))

    return make


def measured(spec, model: str, plan: LongPlan = PLAN, prompts=PROMPTS) -> LongGeneration:
    base = record_base(spec("base"), prompts, plan, max_length=1024)
    return measure_against(base, spec(model))


def test_a_model_beside_itself_differs_in_nothing(spec):
    found = measured(spec, "base")

    assert [decoding.name for decoding in found.decodings] == ["greedy", "sampled"]
    for decoding in found.decodings:
        assert decoding.divergence.positions == (None, None, None)
        assert decoding.divergence.never.value == 1
        assert all(part.divergence.value == pytest.approx(0, abs=1e-9) for part in decoding.curve)
        assert decoding.base == decoding.model
    assert found.decodings[0].noise is not None
    assert found.decodings[0].noise.never.value == 1
    assert found.decodings[1].noise is None


def test_texts_part_where_the_models_differ(spec):
    greedy = measured(spec, "other").decodings[0]

    # Prompts end with 1, 2 and 0: a 3 is written as the 2nd, 1st and 3rd token, and what follows
    # it differs.
    assert greedy.divergence.positions == (3, 2, 4)
    # The base gives the 4 after a 3 the softmax of 6 against 2, 1 and five 0.
    p = math.exp(6) / (math.exp(6) + math.exp(2) + math.exp(1) + 5)
    assert greedy.parting_probability == pytest.approx(p, rel=1e-6)


def test_divergence_along_the_text_is_that_of_the_bases_tokens(spec):
    greedy = measured(spec, "drifting").decodings[0]

    # The last quarter of the first text: its positions are 32 to 41 of prompt and text, and the
    # token at position t + 1 is predicted from the logits at t.
    text = [(place) % 7 for place in range(42)]
    expected = []
    for place in range(31, 41):
        base = LIKELY[text[place]].log_softmax(-1).double()
        drifted = LIKELY[text[place]].clone()
        drifted[1] += 0.01 * place
        model = drifted.log_softmax(-1).double()
        expected.append(float((base.exp() * (base - model)).sum()))
    assert greedy.compounding is not None
    assert greedy.compounding.late == pytest.approx(
        sum(_late(first, length) for first, length in ((0, 2), (2, 1), (5, 3))) / 3, rel=1e-4
    )
    assert _late(0, 2) == pytest.approx(sum(expected) / 10)
    assert greedy.compounding.ratio.low > 1
    assert any("errors compound" in line for line in explain(measured(spec, "drifting")))


def _late(first: int, prompt: int) -> float:
    """Mean KL over the last ten of 40 tokens behind a prompt that starts with `first`."""
    places = torch.arange(prompt + 29, prompt + 39)
    base = LIKELY[(first + places) % 7]
    drifted = base.clone()
    drifted[:, 1] += 0.01 * places
    p, q = base.log_softmax(-1).double(), drifted.log_softmax(-1).double()
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_recorded_base_starts_no_engine_again(spec):
    first = measured(spec, "other")
    assert [Path(each.model).name for each in ToyEngine.started] == ["base", "other"]

    second = measured(spec, "other")

    assert [Path(each.model).name for each in ToyEngine.started] == ["base", "other", "other"]
    assert second == first


def test_another_plan_is_recorded_anew(spec):
    measured(spec, "other")
    measured(spec, "other", PLAN.model_copy(update={"seed": 5}))

    assert [Path(each.model).name for each in ToyEngine.started].count("base") == 2


def test_a_damaged_record_is_named(spec, tmp_path):
    record_base(spec("base"), PROMPTS, PLAN, max_length=1024)
    (path,) = (tmp_path / "cache" / "long-generation").glob("*/texts.json")
    path.write_text(path.read_text()[:50])

    with pytest.raises(CheckpointError, match=r"texts\.json cannot be read: delete it"):
        record_base(spec("base"), PROMPTS, PLAN, max_length=1024)


def test_models_may_end_their_texts_where_prompts_are_the_users(spec):
    prompts = PromptSet(rows=((5,), (6,)), source="asked.txt", ends=True)
    found = measured(spec, "base", LongPlan(prompts=2, tokens=200, temperature=2.0), prompts)

    sampled = found.decodings[1]
    assert sampled.base.ended == 2
    assert max(sampled.base.lengths) < 200
    assert found.decodings[0].base.lengths == (200, 200)
    assert found.decodings[0].base.ended == 0
    assert any("ends 2 of 2 texts by itself" in line for line in explain(found))


def test_seeds_belong_to_prompts(spec):
    same = PromptSet(rows=((0,), (0,), (0,)), source="same.txt", ends=False)
    plan = LongPlan(prompts=3, tokens=40, decodings=("sampled",), temperature=3.0, noise=False)
    base = record_base(spec("base"), same, plan, max_length=1024)

    assert len(set(base.texts.by_decoding["sampled"].rows)) == 3
    moved = plan.model_copy(update={"seed": 1})
    again = record_base(spec("base"), same, moved, max_length=1024)
    # Prompt i of seed 1 has the seed of prompt i + 1 of seed 0.
    rows = base.texts.by_decoding["sampled"].rows
    assert again.texts.by_decoding["sampled"].rows[:2] == rows[1:]


def test_what_does_not_fit_is_cut_and_said(spec):
    base = record_base(spec("base"), PROMPTS, PLAN, max_length=24)

    assert base.room.tokens == 20
    assert ToyEngine.started[0].max_model_len == 24
    (warning,) = measure_against(base, spec("base")).warnings
    assert "20 tokens long, not 40: the model takes 24 positions" in warning


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(ConfigError, match=r"23 tokens leaves no room .* of 24 positions"):
        fit(PLAN, 23, 24)


def test_a_cache_of_4_bits_is_read_by_an_engine_of_its_own(spec, monkeypatch):
    asked = []

    def open_scorer(backend, spec, length, log):
        asked.append((Path(spec.model).name, length))
        return ToyEngine(spec, log)

    monkeypatch.setattr(measure, "open_scorer", open_scorer)
    monkeypatch.setattr(ToyEngine, "score", _score, raising=False)
    base = record_base(spec("base"), PROMPTS, PLAN, max_length=1024)
    options = (("additional_config", {"quantkit": {"kv_cache": {"dtype": "int4"}}}),)
    model = EngineSpec(spec("other").model, options=options)

    found = measure_against(base, model)

    assert asked == [("other", 43)]
    assert found.decodings[0].divergence.positions == (3, 2, 4)


def _score(self, tokens, *, base=None, keep=None):
    from vllm_quantkit.evaluate.window_scores import WindowScores

    return WindowScores.from_json(
        self.ask("score_window", tokens=list(tokens), base=base, keep=keep)
    )


def test_an_engine_keeps_the_options_it_is_given():
    room = fit(PLAN, 3, 1024)
    spec = EngineSpec("m", options=(("enforce_eager", True), ("max_num_batched_tokens", 64)))

    found = dict(writing_spec(spec, room).options)

    assert found == {
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "max_num_batched_tokens": 64,
    }
