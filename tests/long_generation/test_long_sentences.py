"""What long generation is said to mean."""

from __future__ import annotations

import math

import pytest

from tests.reporting.evaluations import LONG
from vllm_quantkit.evaluate.intervals import Interval
from vllm_quantkit.long_generation.divergence import diverge
from vllm_quantkit.long_generation.explain import compounding_verdict, explain
from vllm_quantkit.long_generation.result import Loop

VERDICTS = {
    (1.5, 1.2, 1.9): "errors compound, so scores of short answers flatter this model",
    (1.1, 0.8, 1.4): "no sign that errors compound",
    (0.5, 0.4, 0.7): "errors do not compound",
    (math.nan, math.nan, math.nan): "too little divergence to tell",
    (2.0, math.nan, math.nan): "too little divergence to tell",
}


@pytest.mark.parametrize("bounds", VERDICTS)
def test_the_verdict_needs_the_whole_interval(bounds):
    value, low, high = bounds

    assert VERDICTS[bounds] in compounding_verdict(Interval(value=value, low=low, high=high))


def said(**changes: object) -> str:
    """What is said of the greedy texts, some of it changed."""
    greedy = LONG.decodings[0].model_copy(update=changes)
    return "\n".join(explain(LONG.model_copy(update={"decodings": (greedy,)})))


def test_every_sentence_of_an_example():
    # By hand: of three texts, two part, at 31 and 5; the base parts from itself at 51.
    assert explain(LONG)[:4] == (
        "Greedy: the quantised model parts from the base in 2 of 3 texts of up to 60 tokens; half "
        "of the texts have parted at token 31.",
        "Greedy: the base parts from itself in 1 of 3 texts when batches have another size, later "
        "than the quantised model, whose divergence before that is its own.",
        "Greedy: where they part, the base itself gave its own token a probability of 40% "
        "(median): a close call.",
        "Greedy: KL divergence along the base's text is 0.0223 nats in its first quarter and "
        "0.0373 in its last, 1.67 times as much (95 %: 1.67 to 1.67): errors compound, so scores "
        "of short answers flatter this model.",
    )


def test_divergence_that_batches_make_as_well_is_called_so():
    early = diverge([[1, 2], [1, 2], [1, 2]], [[9, 2], [9, 2], [1, 2]])

    assert "no more than rounding" in said(noise=early)
    none = diverge([[1], [1]], [[1], [1]])
    assert "so none of that is rounding in batches" in said(noise=none)
    assert "batches" not in said(noise=None)


def test_models_that_write_the_same_are_said_to():
    same = diverge([[1, 2], [3]], [[1, 2], [3]])

    assert "token for token, in all 2 texts" in said(divergence=same)


def test_texts_that_mostly_stay_the_same_have_no_half():
    mostly = diverge([[1], [1], [1]], [[1], [1], [2]])

    assert "1 of 3 texts of up to 1 tokens; more than half of the texts never part" in said(
        divergence=mostly
    )


def test_loops_are_told_with_their_place_and_the_bases_beside():
    looping = LONG.decodings[0].base
    none = looping.model_copy(update={"loops": ()})
    later = looping.model_copy(update={"loops": (Loop(prompt=1, position=30, period=2),)})

    assert (
        "its 3 texts end in a loop, the first from token 30 on; none of the base's does."
        in said(base=none, model=later)
    )
    assert "none of its texts ends in a loop; 1 of the base's does." in said(model=none, base=later)
    assert "none of its texts ends in a loop, nor do the base's." in said(model=none, base=none)


def test_a_base_that_loops_itself_says_little_of_late_text():
    written = LONG.decodings[0].base
    one = written.model_copy(update={"loops": (Loop(prompt=0, position=3, period=1),)})

    assert "1 of 3 of the base's own texts end in a loop" in said(base=one)
    assert "give prompts" not in said(base=written.model_copy(update={"loops": ()}))


def test_lengths_are_told_where_texts_may_end():
    assert "ends 1 of 3 texts by itself (median 60 tokens), the base 1" in said()
    ignored = LONG.model_copy(update={"ends": False})
    assert not any("by itself" in line for line in explain(ignored))
