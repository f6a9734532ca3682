"""Every rule in a case where it holds and in one where it does not, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.advise.situations import measured, situation, trial
from vllm_quantkit.advise.quality import PUBLISHED, PUBLISHED_CACHES, SUB_4_BIT, QualityRange
from vllm_quantkit.advise.rule import Rule
from vllm_quantkit.advise.rules import RULES
from vllm_quantkit.advise.situation import Situation, Trial, reasons_at_length

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """A situation in which a rule holds, and one like it in which it does not."""

    holds: tuple[Situation, Trial | None]
    fails: tuple[Situation, Trial | None]


def whole(holds: Situation, fails: Situation) -> Case:
    return Case((holds, None), (fails, None))


A10 = {"device": "NVIDIA A10", "capability": (8, 6), "fp8": False, "numbers": ("bf16", "int8")}
TIGHT = {"fits_plain": True, "gain": 1.05}
RANGE = QualityRange(low=0.001, high=0.04, basis="published", words="others")

CASES: dict[str, Case] = {
    "quantised-already": whole(situation(quantized_as="awq"), situation()),
    "full-fine-tuning": whole(situation(training="full"), situation(training="lora")),
    "apple-silicon": whole(
        situation(kind="apple", capability=None), situation(kind="cpu", capability=None)
    ),
    "old-gpu": whole(situation(capability=(7, 5)), situation(capability=(8, 0))),
    "mixture-of-experts": whole(situation(experts=64), situation(experts=0)),
    "nothing-fits": whole(situation(fits_any=False), situation(fits_any=True)),
    "best-quality": whole(
        situation(goal="quality", fits_plain=True), situation(goal="quality", fits_plain=False)
    ),
    "fixed-costs": whole(
        situation(**TIGHT, limit_plain="fixed costs"),
        situation(fits_plain=True, gain=1.3, limit_plain="fixed costs"),
    ),
    "compute-bound": whole(
        situation(**A10, **TIGHT, limit_plain="arithmetic"),
        situation(**TIGHT, limit_plain="arithmetic"),
    ),
    "little-to-gain": whole(
        situation(**TIGHT, limit_plain="memory bandwidth"),
        situation(fits_plain=False, gain=1.05, limit_plain="memory bandwidth"),
    ),
    "does-not-fit": Case((situation(), trial(fits=0.4)), (situation(), trial(fits=1.0))),
    "kl-measured-above": Case(
        (situation(max_kl=0.01), trial(quality=measured(0.02))),
        (situation(max_kl=0.01), trial(quality=measured(0.01))),
    ),
    # The likely value of the range, sqrt(0.001 * 0.04), is 0.0063.
    "kl-likely-above": Case(
        (situation(max_kl=0.006), trial(quality=RANGE)),
        (situation(max_kl=0.007), trial(quality=RANGE)),
    ),
    "fp8-without-hardware": Case((situation(**A10), trial("fp8")), (situation(), trial("fp8"))),
    "fp8-on-cpu": Case(
        (situation(kind="cpu", fp8=False), trial("fp8")),
        (situation(kind="cpu", fp8=False), trial("int8")),
    ),
    "int8-without-hardware": Case(
        (situation(numbers=("bf16",)), trial("smoothquant")),
        (situation(numbers=("bf16",)), trial("int8")),
    ),
    "int4-cache-of-latents": Case(
        (situation(mla=True), trial(cache="int4")), (situation(mla=True), trial(cache="fp8"))
    ),
    "fp8-is-lossless": Case((situation(), trial("fp8")), (situation(), trial("smoothquant"))),
    "calibrated-4-bit": Case((situation(), trial("awq")), (situation(), trial("int4"))),
    "per-channel-before-blocks": Case(
        (situation(), trial("fp8")), (situation(), trial("fp8-block"))
    ),
    "whole-cache": Case((situation(), trial(cache="auto")), (situation(), trial(cache="fp8"))),
    "measured-cache": Case((situation(), trial(cache="fp8")), (situation(), trial(cache="int4"))),
    "whole-cache-for-reasoning": Case(
        (situation(reasoning=True), trial(cache="fp8")),
        (situation(reasoning=True), trial(cache="int4")),
    ),
    "long-chains-of-thought": whole(
        situation(reasoning=True, chosen="awq"), situation(reasoning=True, chosen="16-bit")
    ),
    "few-samples": whole(situation(samples=128), situation(samples=256)),
    "sub-4-bit": whole(situation(bits=3), situation(bits=4)),
    "small-model": whole(
        situation(parameters=500_000_000, chosen="awq", chosen_quality=RANGE),
        situation(parameters=500_000_000, chosen="awq", chosen_quality=measured(0.02)),
    ),
    "smoothquant-varies": whole(
        situation(chosen="smoothquant", chosen_quality=RANGE),
        situation(chosen="smoothquant", chosen_quality=measured(0.002)),
    ),
    "rounded-at-load": whole(situation(chosen="int4"), situation(chosen="awq")),
    "int4-cache": whole(
        situation(chosen="awq", chosen_cache="int4"), situation(chosen="awq", chosen_cache="fp8")
    ),
    "fp8-cache": whole(
        situation(chosen="awq", chosen_cache="fp8"), situation(chosen="awq", chosen_cache="auto")
    ),
    "not-all-at-once": whole(
        situation(chosen="awq", chosen_sequences=12.5),
        situation(chosen="awq", chosen_sequences=32.0),
    ),
    "beyond-positions": whole(
        situation(max_position=1024, context=2048), situation(max_position=0, context=2048)
    ),
    "kl-not-certain": whole(
        situation(max_kl=0.01, chosen="awq", chosen_quality=RANGE),
        situation(max_kl=0.05, chosen="awq", chosen_quality=RANGE),
    ),
    "unmeasured-on-gpu": whole(situation(chosen="fp8"), situation(kind="cpu", chosen="awq")),
    "adapters": whole(
        situation(training="lora", chosen="smoothquant"), situation(training="lora", chosen="fp8")
    ),
}


def test_every_rule_has_a_case_and_a_name_of_its_own() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert set(CASES) == set(names)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_holds_where_it_should_and_nowhere_else(rule: Rule) -> None:
    case = CASES[rule.name]
    assert rule.holds(*case.holds)
    assert not rule.holds(*case.fails)
    sentence = rule.say(*case.holds)
    assert sentence
    assert "{" not in sentence


def is_source(source: str) -> bool:
    """True for a URL, or a result file of this project."""
    return source.startswith("https://") or (ROOT / source).is_file()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_says_where_it_comes_from(rule: Rule) -> None:
    assert is_source(rule.source)


def test_published_figures_say_where_they_come_from() -> None:
    ranges = [*PUBLISHED.values(), *PUBLISHED_CACHES.values(), *SUB_4_BIT.values()]
    for quality in ranges:
        assert 0 <= quality.low <= quality.high
        assert quality.basis == "exact" or (quality.sources and quality.words)
        assert all(map(is_source, quality.sources))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", True),
        ("Qwen/QwQ-32B", True),
        ("Qwen/Qwen3-4B-Thinking-2507", True),
        ("meta-llama/Llama-3.1-8B-Instruct", False),
        ("org/Raptor1-7B", False),
    ],
)
def test_long_thinkers_are_known_by_their_names(name: str, expected: bool) -> None:
    assert reasons_at_length(name) is expected


def test_long_thinkers_are_known_by_their_chat_template(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert not reasons_at_length(str(folder))
    (folder / "chat_template.jinja").write_text("{{ '<think>\\n' }}")
    assert reasons_at_length(str(folder))
