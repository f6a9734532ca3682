"""The kernel foretold for a layer is the one that packing it chooses, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from quantkit_kernels import devices
from quantkit_kernels.act_quant import PER_TENSOR
from quantkit_kernels.code_types import CODE_BOOKS, CodeType
from quantkit_kernels.targets import Target, target_of
from quantkit_kernels.tuning import Device as Gpu
from tests.kernels.paper_gpu import paper_gpu
from vllm_quantkit.check.kernels import foresee, target_for
from vllm_quantkit.formats import Role
from vllm_quantkit.hardware import find_device
from vllm_quantkit.schemes import w8a8
from vllm_quantkit.schemes.linear import linear_scheme
from vllm_quantkit.spec import ALL_ROWS, PER_CHANNEL, ActivationSpec, SchemeSpec, WeightSpec

N, K = 64, 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weight_only(bits: int, code_type: CodeType = "int", group_size: int = 64) -> SchemeSpec:
    weight = WeightSpec(bits=bits, group_size=group_size, symmetric=True, code_type=code_type)
    return SchemeSpec(dialect="compressed-tensors", weight=weight)


def eight_bits(code_type: CodeType, activation: ActivationSpec, **weight: int) -> SchemeSpec:
    spec = WeightSpec(
        bits=8, symmetric=True, code_type=code_type, **{"group_size": PER_CHANNEL, **weight}
    )
    return SchemeSpec(dialect="compressed-tensors", weight=spec, activation=activation)


E4M3, INT8 = ActivationSpec(code="e4m3"), ActivationSpec(code="int8")
STATIC = ActivationSpec(code="e4m3", dynamic=False, group_size=PER_TENSOR)
SPECS = [
    *(weight_only(bits) for bits in range(2, 9)),
    *(weight_only(4, book) for book in CODE_BOOKS),
    weight_only(8, "e4m3", PER_CHANNEL),
    weight_only(8, "e5m2", PER_CHANNEL),
    eight_bits("e4m3", E4M3),
    eight_bits("e5m2", E4M3),
    eight_bits("e4m3", STATIC, scale_rows=ALL_ROWS),
    eight_bits("e4m3", ActivationSpec(code="e4m3", group_size=128), group_size=128, scale_rows=128),
    eight_bits("int", INT8),
    eight_bits("int", ActivationSpec(code="int8", symmetric=False)),
    eight_bits("int", ActivationSpec(code="int8", outlier_threshold=6.0)),
]


def parts_of(spec: SchemeSpec, *, stats: bool = False) -> dict[Role, Tensor]:
    weight = spec.weight
    size = K if weight.group_size == PER_CHANNEL else weight.group_size
    groups = weight.num_groups(K)
    finite = 2**weight.bits if weight.code_type in ("int", "nf4", "fp4") else 100
    parts = {
        Role.CODES: torch.randint(0, finite, (N, K), dtype=torch.uint8),
        Role.SCALES: torch.rand(N, groups) + 0.5,
        Role.ZEROS: torch.full((N, groups), weight.default_zero),
        Role.GROUP_INDEX: (torch.arange(K) // size).int(),
    }
    if spec.activation is not None and not spec.activation.dynamic:
        parts[Role.INPUT_SCALE] = torch.ones(1)
    return {**parts, Role.INPUT_ABSMAX: torch.full((K,), 7.0)} if stats else parts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=SchemeSpec.describe)
def test_on_this_cpu(spec, dtype):
    scheme = linear_scheme(spec)

    packed = scheme.pack(parts_of(spec), dtype)

    assert packed.kernel.name == scheme.kernel_name(target_of(torch.device("cpu")), dtype)


def test_statistics_fix_the_outliers():
    spec = SPECS[-1]
    scheme = linear_scheme(spec)

    packed = scheme.pack(parts_of(spec, stats=True), torch.float32)

    target = target_of(torch.device("cpu"))
    assert packed.kernel.name == scheme.kernel_name(target, torch.float32, fixed_outliers=True)
    assert packed.kernel.name.endswith("fixed by statistics")


GPUS = {
    (8, 0): Gpu(80, 108, 166912, "A100"),
    (8, 9): Gpu(89, 142, 101376, "L40S"),
    (9, 0): Gpu(90, 132, 232448, "H200"),
}


@pytest.mark.parametrize("capability", GPUS, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=SchemeSpec.describe)
def test_on_a_gpu_that_is_not_there(spec, capability, monkeypatch):
    """CPU tensors are packed by the modules that launch Triton kernels."""
    monkeypatch.setattr(w8a8, "lacks_fp8", lambda device: capability < w8a8.FP8_CAPABILITY)
    scheme, target = linear_scheme(spec), Target("cuda", capability)
    with paper_gpu(GPUS[capability]):
        packed = [scheme.pack(parts_of(spec), dtype) for dtype in DTYPES]

    names = [scheme.kernel_name(target, dtype) for dtype in DTYPES]
    assert [layer.kernel.name for layer in packed] == names


@contextmanager
def generic_kernels() -> Iterator[None]:
    devices.backend.cache_clear()
    kept = dict(devices.MODULES)
    devices.MODULES.clear()
    try:
        yield
    finally:
        devices.MODULES.update(kept)
        devices.backend.cache_clear()


@pytest.mark.parametrize("spec", SPECS, ids=SchemeSpec.describe)
def test_on_any_other_device(spec):
    scheme = linear_scheme(spec)
    with generic_kernels():
        packed = scheme.pack(parts_of(spec), torch.bfloat16)

    assert packed.kernel.name == scheme.kernel_name(Target("mps"), torch.bfloat16)


def test_an_old_gpu_says_why_fp8_layers_are_weight_only():
    found = foresee(SPECS[11], find_device("A10"), "bfloat16", fixed_outliers=False)

    assert found.name.endswith("weight-only because this GPU has no FP8 arithmetic")
    assert "compute capability 8.6 has no FP8 arithmetic, which takes 8.9" in found.warning
    assert foresee(SPECS[11], find_device("L40S"), "bfloat16", fixed_outliers=False).warning == ""


@pytest.mark.parametrize(
    ("features", "spec", "unit"),
    [
        ({"avx512f", "avx512bw", "avx512bf16", "avx512vnni"}, weight_only(4), "bf16"),
        ({"avx512f", "avx512bw", "avx512vnni"}, weight_only(4), "fma"),
        ({"avx512f", "avx512bw", "avx512vnni"}, eight_bits("int", INT8), "vnni"),
        ({"avx2"}, eight_bits("int", INT8), "fma"),
        ({"neon"}, eight_bits("e4m3", E4M3), "fma"),
    ],
)
def test_the_unit_follows_from_what_a_cpu_can_do(features, spec, unit):
    target = Target("cpu", features=frozenset(features))

    assert linear_scheme(spec).kernel_name(target, torch.bfloat16).startswith(f"CPU {unit} panels")


def test_a_device_is_the_target_that_its_tensors_would_have():
    assert target_for(find_device("H200")) == Target("cuda", (9, 0))
    assert target_for(find_device("cpu")) == target_of(torch.device("cpu"))


@pytest.mark.parametrize("group_size", [-1, 16, 64, 96, 128])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_that_cut_a_block_are_foretold(group_size, ranks):
    """`check_cuts` refuses what `own_groups` refuses of any rank's real share."""
    K = 384
    size = K if group_size == PER_CHANNEL else group_size

    def refuses(rank: int) -> bool:
        share = K // ranks
        index = torch.arange(rank * share, (rank + 1) * share) // size
        parts = (torch.zeros(1, share, dtype=torch.uint8), torch.ones(1, -(-K // size)))
        zeros = torch.zeros(1, -(-K // size))
        weight = w8a8.QuantizedWeight(*parts, zeros, index, 8)
        try:
            w8a8.own_groups(weight, group_size)
        except w8a8.UnsupportedScheme:
            return True
        return False

    real = any(refuses(rank) for rank in range(ranks))
    if real:
        with pytest.raises(w8a8.UnsupportedScheme, match="cuts between blocks"):
            w8a8.check_cuts(K, ranks, group_size)
    else:
        w8a8.check_cuts(K, ranks, group_size)
