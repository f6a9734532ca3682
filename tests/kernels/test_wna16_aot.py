"""The weight-only kernels compile for every GPU generation, without spills, in few instructions."""

from __future__ import annotations

import pytest

from tests.kernels.gates import MARKS, Gate
from tests.kernels.wna16_builds import (
    HOPPER,
    ROWS,
    VARIANTS,
    Variant,
    build,
    full_waits,
    gates,
    per_weight,
)

pytestmark = MARKS


@pytest.mark.parametrize("gate", gates(), ids=str)
def test_gate(gate: Gate) -> None:
    compiled = gate.check()
    variant = VARIANTS.get(gate.name)
    if variant is not None and variant.device is HOPPER:
        assert full_waits(compiled) <= (not variant.tile.scale_weights)


@pytest.mark.parametrize(
    ("variant", "most"),
    [
        (Variant(HOPPER, (16, 128), 4, 128), 2.6),
        (Variant(HOPPER, (16, 128), 4, 32), 3.7),
        (Variant(HOPPER, (16, 128), 8, ROWS, zero=128), 2.9),
        (Variant(HOPPER, (16, 128), 8, 128, "fp16"), 2.9),
        (Variant(HOPPER, (16, 128), 4, 128, code="fp4"), 3.9),
    ],
    ids=str,
)
def test_the_memory_is_the_limit(variant: Variant, most: float) -> None:
    """In the time it takes to read a weight, an H200 issues 3.9 instructions per 4 bits."""
    assert per_weight(build(variant), variant) <= most
