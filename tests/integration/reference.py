"""What an engine must answer: the float32 twin through transformers, and how close is close."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

MEAN_TOLERANCE = 2e-4
"""Mean |difference| of log-probabilities, engine and twin both in float32.

Both hold the same weights and only the order of sums differs, which makes 2e-6 .. 4e-6 here. One
group's zero-points off by one in one layer of 8 bits make 1e-2.
"""

FLIPPED_TOLERANCE = 0.3
"""The same where activations are quantised.

Values next to a rounding boundary fall on the other side after the last bit of a sum changed; that
moves later values over other boundaries, so that scores of a random model drift apart by up to the
noise that the quantisation makes anyway: 0.03 to 0.2 here. That layers compute exactly what they
mean is checked layer by layer, on equal inputs.
"""

PERPLEXITY_TOLERANCE = 3e-3
"""Relative difference of perplexities: the accuracy the project promises."""

Scores = list[list[float]]


def prompts(count: int = 3, length: int = 48, vocabulary: int = 512, seed: int = 0) -> Scores:
    """Random token lists of different lengths; the first few ids, special tokens, stay out."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(4, vocabulary, (length - 7 * i,), generator=generator).tolist()
        for i in range(count)
    ]


def twin_scores(folder: Path, token_lists: list[list[int]]) -> Scores:
    """Scores through transformers in float32.

    Only its eager attention caps the logits as Gemma 2 does.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return token_scores(model.eval(), token_lists)


@torch.no_grad()
def token_scores(model: nn.Module, token_lists: list[list[int]]) -> Scores:
    """log p(token | tokens before it) for every token but the first of each list."""
    return [_scores(model, tokens) for tokens in token_lists]


def assert_same_scores(found: Scores, expected: Scores) -> None:
    """Token by token within `MEAN_TOLERANCE`, perplexity within `PERPLEXITY_TOLERANCE`."""
    mean = mean_difference(found, expected)
    assert mean <= MEAN_TOLERANCE, f"log-probabilities differ by {mean:.2e} on average"
    assert abs(perplexity(found) / perplexity(expected) - 1) <= PERPLEXITY_TOLERANCE


def assert_similar_scores(found: Scores, expected: Scores) -> None:
    """Token by token within `FLIPPED_TOLERANCE` on average."""
    mean = mean_difference(found, expected)
    assert mean <= FLIPPED_TOLERANCE, f"log-probabilities differ by {mean:.2e} on average"


def mean_difference(found: Scores, expected: Scores) -> float:
    """The mean |difference| of the scores of the same tokens."""
    assert [len(scores) for scores in found] == [len(scores) for scores in expected]
    pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def perplexity(scores: Scores) -> float:
    """exp(-mean log-probability)."""
    flat = [score for row in scores for score in row]
    return math.exp(-sum(flat) / len(flat))


def _scores(model: nn.Module, tokens: list[int]) -> list[float]:
    logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    following = torch.tensor(tokens[1:])[:, None]
    return logits.log_softmax(-1).gather(1, following)[:, 0].tolist()
