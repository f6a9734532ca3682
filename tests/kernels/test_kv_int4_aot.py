"""The kernels of the 4-bit cache compile for every GPU generation, in few instructions."""

from __future__ import annotations

import pytest

from quantkit_kernels.kv_int4.triton_tiles import decode_tile
from tests.kernels import kv_int4_builds as builds
from tests.kernels.gates import MARKS, Gate

pytestmark = MARKS

GATES = {gate.name: gate for gate in builds.gates()}

TENSOR_CORES = {"HMMA", "HGMMA", "UTCHMMA"}


@pytest.mark.parametrize("gate", GATES.values(), ids=str)
def test_gate(gate: Gate) -> None:
    compiled = gate.check()
    if not gate.name.startswith("gather"):
        assert TENSOR_CORES & set(compiled.opcodes)


@pytest.mark.parametrize(("size", "group"), builds.DECODED)
def test_decoding_leaves_the_memory_as_the_limit(size: int, group: int) -> None:
    """An H200 issues 4.2 instructions per value of 4.375 bits in the time it takes to read it."""
    gate = GATES[builds.decode_name(size, group, builds.HOPPER)]
    assert gate.per_value is not None
    compiled = gate.build()
    assert compiled.main_loop["LDG"] == 0, "a load in the loop is not asynchronous"
    if group <= 8:
        assert gate.per_value(compiled) <= 3.5


def test_decoding_float32_compiles() -> None:
    layout = builds.layout_of(128)
    tile = decode_tile(4, layout, builds.ADA, exact=True)
    compiled = builds.decode(layout, 4, tile, "fp32", 89)
    assert compiled.stack == 0
    assert compiled.shared <= builds.ADA.shared_bytes
