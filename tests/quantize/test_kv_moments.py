"""Moments of queries, keys and values, and the treatments that they give."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.kv_cache.moments import CHOICES, QUIETEST, KeyMoments

HEADS, SIZE, GROUP = 3, 20, 2

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]
"""Queries, keys, values, and their half."""


def batches(seed: int = 0, offset: float = 0.0) -> list[Batch]:
    """Ragged; two query heads of other sizes share a KV head; keys of bfloat16 too."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.1, 5, SIZE)
    loudness = torch.exp2(torch.randn(HEADS * GROUP, 1, SIZE, generator=generator))
    found = []
    for index, (samples, tokens) in enumerate(((2, 7), (1, 1), (3, 4), (1, 5), (2, 6))):
        key, value = torch.randn(2, samples, HEADS, tokens, SIZE, generator=generator)
        key = key * spread + offset
        query = torch.randn(samples, HEADS * GROUP, tokens, SIZE, generator=generator)
        key = key.bfloat16() if index == 2 else key
        found.append((0.3 + query * loudness, key, 3 * value, index % 2))
    return found


def summed(given: list[Batch]) -> KeyMoments:
    moments = KeyMoments(HEADS, SIZE, torch.device("cpu"))
    for batch in given:
        moments.add(*batch)
    return moments


def tokens_of(given: list[Batch], half: int | None = None) -> torch.Tensor:
    """Keys, float64 [tokens, heads, size]."""
    keys = [key for _, key, _, other in given if half in (None, other)]
    return torch.cat([key.double().transpose(1, 2).flatten(0, 1) for key in keys])


def query_size(given: list[Batch]) -> torch.Tensor:
    """RMS of queries, float64 [kv_heads, size], a query head at a time."""
    rows = torch.cat([query.double().transpose(1, 2).flatten(0, 1) for query, *_ in given])
    mine = [rows[:, [h for h in range(HEADS * GROUP) if h // GROUP == kv]] for kv in range(HEADS)]
    return torch.stack([queries.flatten(0, 1).square().mean(0).sqrt() for queries in mine])


@pytest.mark.parametrize("offset", [0.0, 600.0])
def test_mean_and_spread_are_those_of_all_tokens(offset: float):
    given = batches(offset=offset)
    moments, keys = summed(given), tokens_of(given)
    # float64 sums of about 40 values: the offset costs the square 12 of 52 bits.
    torch.testing.assert_close(moments.mean(), keys.mean(0), rtol=1e-13, atol=1e-13)
    expected = keys.std(0, correction=0)
    torch.testing.assert_close(moments.spread(), expected, rtol=1e-7, atol=0)
    for half in range(2):
        mine = tokens_of(given, half)
        torch.testing.assert_close(moments.mean([half]), mine.mean(0), rtol=1e-13, atol=1e-13)


def test_lambda_is_the_root_of_spread_over_queries_with_mean_one():
    given = batches()
    scale = summed(given).treatment("shift+scale").scale
    assert scale is not None
    assert scale.dtype == torch.float32
    spread = tokens_of(given).std(0, correction=0)
    ratio = scale.double() / (spread / query_size(given)).sqrt()
    # float32 of the scale
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-6, atol=0)
    assert float(scale.log().mean(-1).abs().max()) < 1e-6


def test_no_lambda_leaves_less_error_in_logits():
    """sum (k / lambda)^2 * sum (lambda q)^2 is at its least, which Cauchy and Schwarz give."""
    given = batches()
    scale = summed(given).treatment("shift+scale").scale
    assert scale is not None
    key, query = tokens_of(given).std(0, correction=0), query_size(given)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (key / scale).square().sum(-1) * (query * scale).square().sum(-1)

    # float32 of the scale, at a minimum
    torch.testing.assert_close(error(scale), (key * query).sum(-1).square(), rtol=1e-9, atol=0)
    assert bool((error(scale) < 0.95 * error(key.sqrt())).all())


def test_each_choice_takes_more():
    moments = summed(batches())
    kinds = [tuple(part is not None for part in moments.treatment(choice)) for choice in CHOICES]
    assert kinds == [(False, False), (True, False), (True, True)]
    shift = moments.treatment("shift").shift
    assert shift is not None
    assert torch.equal(shift, moments.mean().float())


def test_dead_channels_and_heads_stay_finite():
    key = torch.randn(1, HEADS, 50, SIZE, generator=torch.Generator().manual_seed(1))
    key[:, 1] = 0.0
    key[:, 2, :, 3] = 7.0
    query = torch.ones_like(key)
    moments = summed([(query, key, torch.zeros_like(key), 0)])
    scale = moments.treatment("shift+scale").scale
    assert scale is not None
    assert torch.equal(scale[1], torch.ones(SIZE))
    assert float(scale.min()) > 0
    assert float(scale.max() / scale.min()) < 2 / QUIETEST**0.5
    query[:, 0] = 0.0
    query[:, 2, :, 4] = 0.0
    lame = summed([(query, key, key, 0)]).treatment("shift+scale").scale
    assert lame is not None
    # each of keys and queries moves it by the root of the bound, and the head's own spread by 2
    assert 1 / QUIETEST**0.5 < float(lame[2, 4] / lame[2].median()) < 2 / QUIETEST**0.5
    assert float((lame[0] / scale[0] - 1).abs().max()) < 1e-6, "a head that nobody asks"
    assert moments.fp8_scales[1] == 1.0, "values that are all 0"


def test_fp8_scales_fit_the_largest_key_and_value():
    given = batches()
    key = max(float(key.abs().max()) for _, key, _, _ in given)
    value = max(float(value.abs().max()) for _, _, value, _ in given)
    assert summed(given).fp8_scales == pytest.approx((key / 448, value / 448), rel=1e-7)


def test_halves_that_agree_and_halves_that_do_not():
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(2, 1, HEADS, 4000, SIZE, generator=generator)
    query = torch.ones(1, HEADS, 4000, SIZE)
    alike = summed([(query, keys[0], keys[0], 0), (query, keys[0], keys[0], 1)])
    assert [alike.disagreement(choice) for choice in CHOICES] == [0, 0, 0]
    moved = summed([(query, keys[0] - 1, keys[0], 0), (query, keys[0] + 1, keys[0], 1)])
    # halves 2 apart, over a spread of sqrt(1 + 1)
    assert moved.disagreement("shift") == pytest.approx(2**0.5, rel=0.05)
    steps = torch.linspace(1, 16, SIZE)
    wider = summed([(query, keys[0], keys[0], 0), (query, keys[0] * steps, keys[0], 1)])
    assert wider.disagreement("shift") < 0.1
    # channel 0 is 16 times quieter than the last, relative to the other half; the root of it, less
    # the mean of ln over channels
    factors = steps.log() / 2
    expected = float((factors - factors.mean()).abs().max())
    assert 0.5 * expected < wider.disagreement("shift+scale") <= expected * 1.1
    asked = summed([(query, keys[0], keys[0], 0), (query / steps, keys[0], keys[0], 1)])
    assert asked.disagreement("shift") == 0
    assert 0.5 * expected < asked.disagreement("shift+scale") <= expected * 1.1
    lone = summed([(query, keys[0], keys[0], 1)])
    assert (lone.disagreement("none"), lone.disagreement("shift")) == (0, 1)


def test_means_that_move_with_position_are_seen():
    keys = torch.randn(1, HEADS, 4000, SIZE, generator=torch.Generator().manual_seed(3))
    assert summed([(keys, keys, keys, 0)]).drift() < 0.15
    keys[:, 1, :, 5] += torch.linspace(-4, 4, 4000)
    # halves 4 apart; a ramp of 8 has a spread of 8 / sqrt(12)
    expected = 4 / math.sqrt(1 + 64 / 12)
    assert summed([(keys, keys, keys, 0)]).drift() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_is_refused(value: float, where: int):
    given = batches()
    given[0][where][0, 0, 0, 0] = value
    with pytest.raises(QuantkitError, match="self_attn: queries, keys or values are not finite"):
        summed(given).check("self_attn")
    summed(batches()).check("self_attn")
