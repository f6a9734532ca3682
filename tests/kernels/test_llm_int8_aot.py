"""The kernels of LLM.int8 compile for every GPU generation, for the tensor cores."""

from __future__ import annotations

import pytest

from tests.kernels.gates import MARKS, Gate
from tests.kernels.llm_int8_builds import HALF, Variant, gates, product, products
from tests.kernels.scaled_mm_builds import INTEGER

pytestmark = MARKS


@pytest.mark.parametrize("gate", gates(), ids=str)
def test_gate(gate: Gate) -> None:
    gate.check()


@pytest.mark.parametrize("v", products(), ids=str)
def test_both_products_are_made_in_tensor_cores(v: Variant) -> None:
    opcodes = product(v).opcodes
    assert opcodes[INTEGER[v.device.capability]] > 0
    assert opcodes[HALF[v.device.capability]] > 0
