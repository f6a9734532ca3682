"""The activation kernel compiles for every GPU generation: no spills, 16 bytes a load."""

from __future__ import annotations

from collections import Counter

import pytest

from quantkit_kernels.act_quant import RowQuantizer
from quantkit_kernels.act_quant.source import Kind
from quantkit_kernels.act_quant.triton import FLOAT8_CAPABILITY
from tests.kernels.act_quant_builds import (
    BLOCKS,
    INT8,
    KINDS,
    Variant,
    build,
    gates,
    per_channel,
    steps,
    variants,
)
from tests.kernels.gates import MARKS, Gate
from tests.kernels.sass import instructions, opcode, width

BUDGET: dict[Kind, float] = {"x": 23.4, "norm": 23.4, "add_norm": 54.6, "silu_mul": 39.0}
"""Instructions per channel of bfloat16 that an H200 issues while its memory moves the channel.

7.8 a byte: x or its norm 3 bytes, x + residual 7, silu(gate) * up 5. The kernel has to stay below
two thirds: it is the memory that should be busy.
"""

ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a number."""

SUMMED = RowQuantizer("int8", symmetric=False, sum_group=2050)

pytestmark = MARKS


@pytest.mark.parametrize("gate", gates(), ids=str)
def test_gates(gate: Gate) -> None:
    gate.check()


@pytest.mark.parametrize(("variant", "arch"), variants(), ids=str)
def test_all_loads_and_stores_of_rows_are_of_16_bytes(variant: Variant, arch: int) -> None:
    texts = instructions(build(variant, arch).sass)
    loads = Counter(width(text) for text in texts if opcode(text) == "LDG")
    stores = Counter(width(text) for text in texts if opcode(text) == "STG")
    totals = ITEM[variant.dtype] if variant.kind == "add_norm" else 0
    assert loads == Counter({16: loads[16], 4: variant.scalars})
    assert stores == Counter({16: steps(variant) * (1 + totals), 4: stores[4]})


@pytest.mark.parametrize(("variant", "arch"), variants(), ids=str)
def test_a_row_is_asked_for_before_any_thread_waits(variant: Variant, arch: int) -> None:
    opcodes = [opcode(text) for text in instructions(build(variant, arch).sass)]
    loads = [i for i, name in enumerate(opcodes) if name == "LDG"]
    rows = loads[: len(loads) - variant.scalars]
    assert "BAR" not in opcodes[: rows[-1]]


@pytest.mark.parametrize(("variant", "arch"), variants(), ids=str)
def test_e4m3_is_converted_by_the_gpu(variant: Variant, arch: int) -> None:
    expected = variant.quantizer.code == "e4m3" and arch >= FLOAT8_CAPABILITY
    assert ("E4M3" in build(variant, arch).sass) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "quantizer"), [(36, INT8), (4100, BLOCKS), (2050, SUMMED)])
def test_ragged_rows_compile(kind: Kind, width: int, quantizer: RowQuantizer) -> None:
    compiled = build(Variant(kind, quantizer, width), 90)
    assert compiled.stack == 0
    assert "STG.E.128" in compiled.sass


@pytest.mark.parametrize("quantizer", [INT8, BLOCKS], ids=["int8", "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_an_h200_is_the_limit(kind: Kind, quantizer: RowQuantizer) -> None:
    variant = Variant(kind, quantizer)
    assert per_channel(variant, build(variant, 90)) <= BUDGET[kind] * 2 / 3
