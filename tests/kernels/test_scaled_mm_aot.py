"""The kernels for 8-bit codes compile for every GPU generation, for the tensor cores, and fast."""

from __future__ import annotations

import pytest
import torch

from quantkit_kernels.act_quant import RowQuantizer
from quantkit_kernels.scaled_mm import pack_scaled, scaled_linear
from quantkit_kernels.tuning import Device
from tests.kernels.aot import DEVICES
from tests.kernels.gates import MARKS, Gate
from tests.kernels.paper_gpu import paper_gpu
from tests.kernels.sass import instructions, longest_loop
from tests.kernels.scaled_mm_builds import Variant, build, cases, gates, per_weight
from tests.kernels.scaled_mm_cases import random_scaled_weight

SMALL_INSTRUCTIONS = 1.5
"""Per weight with up to 16 tokens. An H200 issues 7.8 in the time it takes to read 8 bits."""

WIDEST = {"int8": "IGMMA.64x128x32", "e4m3": "QGMMA.64x256x32", "e5m2": "QGMMA.64x256x32"}
"""Hopper's instruction in a wide persistent tile; Triton has none of 256 channels for integers."""

pytestmark = MARKS


@pytest.mark.parametrize("gate", gates(), ids=str)
def test_gate(gate: Gate) -> None:
    gate.check()


@pytest.mark.parametrize("v", [v for v in cases() if v.device.capability == 100], ids=str)
def test_blackwell_multiplies_in_tensor_cores(v: Variant) -> None:
    assert build(v).opcodes[v.products] > 0


@pytest.mark.parametrize(
    "v",
    [v for v in cases() if v.device.capability == 90 and v.tile.block_m == 16],
    ids=str,
)
def test_few_tokens_take_few_instructions(v: Variant) -> None:
    assert per_weight(v, build(v)) <= SMALL_INSTRUCTIONS


@pytest.mark.parametrize("v", [v for v in cases() if v.device.capability == 90], ids=str)
def test_hopper_does_not_wait_for_every_product(v: Variant) -> None:
    """ptxas serialises wgmma where it doubts their registers (C7510, C7515): two waits for each."""
    compiled = build(v)
    products, waits = compiled.opcodes[v.products], compiled.opcodes["WARPGROUP"]
    assert waits <= max(4, products), "wgmma are serialised"


@pytest.mark.parametrize("v", [v for v in cases() if v.persistent], ids=str)
def test_persistent_kernels_load_through_tma(v: Variant) -> None:
    compiled = build(v)
    loop = longest_loop(compiled.sass)
    assert sum("UTMALDG" in text for text in loop) >= 2
    assert compiled.opcodes["LDGSTS"] == 0 or v.groups[1] > 0, "codes take the long way"
    if v.device.capability == 90 and v.tile.block_n == 256:
        widest = WIDEST[str(v).split()[0]]
        assert any(widest in text for text in instructions(compiled.sass))


@pytest.mark.parametrize("device", DEVICES[2:], ids=lambda device: device.name)
@pytest.mark.parametrize(("code_type", "code"), [("int", "int8"), ("e4m3", "e4m3")])
def test_descriptors_of_any_number_of_tokens_share_a_kernel(
    code_type: str, code: str, device: Device
) -> None:
    quantizer, n, k = RowQuantizer(code), 256 * device.multiprocessors, 256
    with paper_gpu(device) as launches:
        packed = pack_scaled(random_scaled_weight(n, k, code_type), quantizer, torch.bfloat16)
        for tokens in (200, 131, 256, 144):
            rows = torch.zeros(tokens, quantizer.layout(k).stride, dtype=torch.uint8)
            scaled_linear(rows, packed, torch.bfloat16)
    assert launches.compiled == ["persistent_gemm"]
    assert launches.launched == ["persistent_gemm"] * 4
