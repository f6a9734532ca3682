"""Foretold bytes of a packed layer are those of packing one, whatever its numerics and size."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from quantkit_kernels.act_quant import PER_TENSOR
from tests.integration.eight_bit import CASES
from tests.kernels.paper_gpu import triton_for_cpu
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.footprint import packed_bytes
from vllm_quantkit.footprint.packed import runs_weight_only
from vllm_quantkit.formats import Role
from vllm_quantkit.hardware import Device, find_device
from vllm_quantkit.options import LayerOptions
from vllm_quantkit.schemes import SCHEMES, get_method
from vllm_quantkit.schemes.linear import linear_scheme
from vllm_quantkit.schemes.wna16 import WNA16
from vllm_quantkit.spec import ALL_ROWS, ActivationSpec, LayerShape, SchemeSpec, WeightSpec

DEVICES = {name: find_device(name) for name in ("cpu", "h100", "a100")}

SHAPES = ((256, 512), (257, 520), (32, 128), (1000, 96))
"""Whole panels and tiles, ragged ones, and layers smaller than either."""


def at_load() -> dict[str, SchemeSpec]:
    """What every method that quantises at load makes of a layer."""
    found = {}
    for name in SCHEMES:
        try:
            spec = get_method(name).at_load(LayerOptions())
        except UnsupportedScheme:
            continue
        if spec is not None:
            found[name] = spec
    return found


def integers(bits: int, group_size: int, *, symmetric: bool, act_order: bool = False) -> SchemeSpec:
    weight = WeightSpec(bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order)
    return SchemeSpec(dialect="quantkit", weight=weight)


def book(code_type: str) -> SchemeSpec:
    weight = WeightSpec(bits=4, group_size=64, symmetric=True, code_type=code_type)
    return SchemeSpec(dialect="bitsandbytes", weight=weight)


NUMERICS = {
    **at_load(),
    **{f"checkpoint: {name}": case.spec for name, case in CASES.items()},
    **{f"nf4 {name}": book(name) for name in ("nf4", "fp4")},
    "2 bits, one scale a channel": integers(2, -1, symmetric=False),
    "3 bits, groups of 96": integers(3, 96, symmetric=True),
    "4 bits, groups of 32": integers(4, 32, symmetric=True),
    "4 bits, groups of 128, zeros": integers(4, 128, symmetric=False),
    "5 bits, groups of 128": integers(5, 128, symmetric=True),
    "8 bits, one scale a channel, zeros": integers(8, -1, symmetric=False),
    "8 bits, groups of 32": integers(8, 32, symmetric=False),
    "4 bits in an order": integers(4, 128, symmetric=False, act_order=True),
    "3 bits in an order": integers(3, 96, symmetric=True, act_order=True),
}
"""The numerics of every scheme and of every dialect's checkpoints."""


def parts_of(spec: SchemeSpec, rows: int, columns: int) -> dict[Role, Tensor]:
    """Random canonical tensors of a layer, as a checkpoint would hold them."""
    numerics, generator = spec.weight, torch.Generator().manual_seed(0)
    groups = numerics.num_groups(columns)
    height = rows if numerics.scale_rows == ALL_ROWS else numerics.scale_rows
    scales = torch.rand(-(-rows // height), groups, generator=generator) + 0.1
    zeros = torch.full((rows, groups), numerics.default_zero)
    if not numerics.symmetric:
        zeros = torch.randint(0, 2**numerics.bits, (rows, groups), generator=generator)
    channels = torch.arange(columns)
    if numerics.act_order:
        channels = torch.randperm(columns, generator=generator)
    size = columns if numerics.group_size < 0 else numerics.group_size
    parts = {
        Role.CODES: torch.randint(0, 2**numerics.bits, (rows, columns), generator=generator).to(
            torch.uint8
        ),
        Role.SCALES: scales.repeat_interleave(height, 0)[:rows],
        Role.ZEROS: zeros.to(torch.uint8),
        Role.GROUP_INDEX: (channels // size).to(torch.int32),
    }
    activation = spec.activation
    if activation is not None and not activation.dynamic:
        parts[Role.INPUT_SCALE] = torch.ones(1)
        if not activation.symmetric:
            parts[Role.INPUT_ZERO] = torch.zeros(1)
    return parts


def packed(spec: SchemeSpec, parts: dict[Role, Tensor], device: Device) -> int:
    """Bytes of the tensors that a layer owns once it is packed."""
    scheme = WNA16(spec) if runs_weight_only(spec, device) else linear_scheme(spec)
    kernels: AbstractContextManager[None] = (
        triton_for_cpu() if device.kind == "cuda" else nullcontext()
    )
    with kernels:
        tensors = scheme.pack(parts, torch.bfloat16).tensors
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_a_layer_takes_the_bytes_foretold(numerics, device):
    spec = NUMERICS[numerics]
    for rows, columns in SHAPES:
        shape = LayerShape(out_features=rows, in_features=columns)
        measured = packed(spec, parts_of(spec, rows, columns), DEVICES[device])
        assert packed_bytes(spec, shape, DEVICES[device]) == measured, f"{rows} x {columns}"


def test_a_gpu_without_fp8_keeps_activations_in_16_bits():
    spec = at_load()["quantkit-fp8"]
    assert runs_weight_only(spec, DEVICES["a100"])
    assert not runs_weight_only(spec, DEVICES["h100"])
    assert not runs_weight_only(at_load()["quantkit-smoothquant"], DEVICES["a100"])


def test_partitions_with_orders_of_their_own_are_packed_one_by_one():
    """Three gathers of 512 channels instead of one, and panels of 32 rows filled up thrice."""
    spec, shape = NUMERICS["4 bits in an order"], LayerShape(out_features=250, in_features=512)
    apart = packed_bytes(spec, shape, DEVICES["cpu"], rows=(150, 50, 50))
    one = packed_bytes(spec, shape, DEVICES["cpu"])
    panels = {"codes": 32 * 512 // 2, "scales": 32 * 4 * 4, "zeros": 32 * 4}
    assert apart - one == 2 * 4 * 512 + (5 + 2 + 2 - 8) * sum(panels.values())


def test_a_rank_whose_share_starts_inside_a_group_takes_more():
    """320 channels of 640, groups of 128: the second rank has 64, 128 and 128 of three groups."""
    spec = NUMERICS["4 bits, groups of 128, zeros"]
    shape = LayerShape(out_features=32, in_features=320)
    codes, groups = 32 * 320 // 2, 5  # groups of 64, so that every one has the same size
    expected = codes + groups * 32 * (4 + 1)
    assert packed_bytes(spec, shape, DEVICES["cpu"], tp_inputs=2) == expected


def test_blocks_of_a_gpu_have_one_scale_unless_a_partition_cuts_them():
    spec = at_load()["quantkit-fp8-block"]
    shape = LayerShape(out_features=512, in_features=256)
    whole = packed_bytes(spec, shape, DEVICES["h100"], rows=(256, 256))
    cut = packed_bytes(spec, shape, DEVICES["h100"], rows=(192, 320))
    assert whole == 512 * 256 + 4 * 2 * 4
    assert cut == 512 * 256 + 4 * 2 * 512


def test_a_share_that_no_kernel_multiplies_is_refused():
    spec = at_load()["quantkit-fp8-block"]
    shape = LayerShape(out_features=128, in_features=192)
    with pytest.raises(UnsupportedScheme, match="cuts between blocks"):
        packed_bytes(spec, shape, DEVICES["cpu"], tp_inputs=2)


def test_static_activations_keep_a_scale_and_a_zero_point():
    weight = WeightSpec(bits=8, group_size=-1, symmetric=True)
    shape = LayerShape(out_features=32, in_features=64)
    dynamic = SchemeSpec(dialect="quantkit", weight=weight, activation=ActivationSpec(code="int8"))
    static = ActivationSpec(code="int8", dynamic=False, group_size=PER_TENSOR, symmetric=False)
    with_both = dynamic.model_copy(update={"activation": static})
    plain = packed_bytes(dynamic, shape, DEVICES["cpu"])
    assert packed_bytes(with_both, shape, DEVICES["cpu"]) == plain + 8
