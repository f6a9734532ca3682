"""Running statistics equal those of all inputs at once."""

from __future__ import annotations

import pytest
import torch

from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.observation.statistics import BLOCK, SAMPLE_ROWS, InputMoments


@pytest.mark.parametrize("width", [3, BLOCK, 2 * BLOCK + 7])
def test_moments_are_those_of_all_inputs(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    batches = [torch.randn(2, n, width, generator=generator) for n in (5, 1, 8)]
    moments = InputMoments(width, hessian=True, expected_rows=28)
    for index, batch in enumerate(batches):
        moments.add(batch, index % 2)
    stats = moments.stats()
    rows = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    # Sums of 28 float32 products.
    assert stats.hessian is not None
    torch.testing.assert_close(stats.hessian.double(), rows.T @ rows / 28, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.hessian, stats.hessian.T)
    torch.testing.assert_close(stats.ranges.mean_abs.double(), rows.abs().mean(0))
    assert torch.equal(stats.ranges.low.double(), rows.amin(0))
    assert torch.equal(stats.ranges.absmax.double(), rows.abs().amax(0))
    assert [half.tokens for half in stats.halves] == [26, 2]
    assert torch.equal(stats.halves[1].high, batches[1].flatten(0, 1).amax(0))
    assert torch.equal(stats.sample.double(), rows)


def test_the_sample_is_spread_over_all_inputs() -> None:
    moments = InputMoments(1, hessian=False, expected_rows=4 * SAMPLE_ROWS)
    for start in range(0, 4 * SAMPLE_ROWS, 100):
        moments.add(torch.arange(start, min(start + 100, 4 * SAMPLE_ROWS))[:, None].float(), 0)
    assert torch.equal(moments.stats().sample[:, 0], 4.0 * torch.arange(SAMPLE_ROWS))
    assert moments.stats().hessian is None


def test_more_inputs_than_expected_do_not_enlarge_the_sample() -> None:
    moments = InputMoments(2, hessian=False, expected_rows=10)
    moments.add(torch.zeros(3 * SAMPLE_ROWS, 2), 0)
    assert len(moments.stats().sample) == SAMPLE_ROWS


def test_nothing_seen_is_an_error() -> None:
    moments = InputMoments(2, hessian=False, expected_rows=10)
    moments.add(torch.zeros(0, 2), 0)
    with pytest.raises(QuantkitError, match="saw no calibration token"):
        moments.stats()
