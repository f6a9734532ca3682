"""The GPU's correctness check, on the CPU: it passes what is right, and says what is not."""

from __future__ import annotations

from itertools import count, islice

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.check import check, faults
from benchmarks.gpu.check_cases import Case, Extent, cases, check_error
from quantkit_kernels.tuning import batch_invariant

TINY = Extent("cpu", ((64, 256),), (17,), (torch.bfloat16,), (36,))


def test_every_operation_passes() -> None:
    some = list(islice(cases(TINY), 1, None, 4))
    families = {case.name.split()[0] for case in some}
    assert families == {"wna16", "scaled_mm", "llm_int8", "act_quant", "kv_int4"}
    assert check(some) == (len(some), [])


def unwritten() -> Tensor:
    y = torch.empty(3, 2)
    y[1:] = 1
    return y


def other_bits_each_time() -> Tensor:
    return torch.full((3, 2), next(COUNTER))


def by_batch(tokens: int) -> Tensor:
    """As if sums were made in another order for other batches, in spite of being told not to."""
    return torch.full((tokens, 2), 1.0 if batch_invariant() else 2.0) + (tokens > 1)


ONES = torch.ones(3, 2)
COUNTER = count(1.0)


@pytest.mark.parametrize(("case", "fault"), [
    (Case("a", unwritten, lambda y: check_error(y, ONES, 0.1)), "a: AssertionError: off by nan"),
    (Case("a", lambda: ONES * 2, lambda y: check_error(y, ONES, 0.1)), "off by 1.0e+00 of"),
    (Case("a", other_bits_each_time, lambda y: None), "a second call gives other bits"),
    (Case("a", lambda: by_batch(3), lambda y: None, lambda: by_batch(1)), "first token alone"),
])  # fmt: skip
def test_faults_are_found(case: Case, fault: str) -> None:
    (found,) = faults(case)
    assert fault in found
    assert not batch_invariant()
