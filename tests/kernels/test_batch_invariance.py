"""A token's result has the same bits alone and in any batch, where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from quantkit_kernels import devices
from quantkit_kernels.act_quant import RowQuantizer, quantize_rows
from quantkit_kernels.llm_int8 import llm_int8_linear, pack_llm_int8
from quantkit_kernels.scaled_mm import pack_scaled, scaled_linear
from quantkit_kernels.tuning import set_batch_invariant
from quantkit_kernels.wna16 import QuantizedWeight, pack_weight, wna16_linear
from tests.kernels.interpreted import (
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)

N, K = 100, 512
BATCHES = (1, 5, 40, 200)
DTYPE = torch.float16
"""The interpreter computes in bfloat16 wrongly."""


@interpreter
@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture
def triton_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on the CPU go to the Triton modules."""
    monkeypatch.setitem(devices.MODULES, "cpu", "triton")
    devices.backend.cache_clear()
    yield
    devices.backend.cache_clear()
    set_batch_invariant(False)


def weight(bits: int, group: int, code_type: str = "int") -> QuantizedWeight:
    """Random, symmetric."""
    zero = 2 ** (bits - 1) if code_type == "int" else 0
    return QuantizedWeight(
        codes=torch.randint(0, 120 if code_type == "e4m3" else 2**bits, (N, K), dtype=torch.uint8),
        scales=torch.rand(N, K // group) * 0.02 + 0.005,
        zeros=torch.full((N, K // group), zero, dtype=torch.uint8),
        group_index=(torch.arange(K) // group).int(),
        bits=bits,
        code_type=code_type,  # type: ignore[arg-type]
    )


Layer = Callable[[int], Tensor]
"""The results of a batch's first tokens, multiplied together."""


def weight_only(x: Tensor, bits: int, group: int, code_type: str = "int") -> Layer:
    packed = pack_weight(weight(bits, group, code_type), DTYPE)
    return lambda m: wna16_linear(x[:m], packed)


def scaled(x: Tensor, code: str, code_type: str, x_group: int, group: int) -> Layer:
    quantizer = RowQuantizer(code, x_group)  # type: ignore[arg-type]
    packed = pack_scaled(weight(8, group, code_type), quantizer, DTYPE)
    rows = quantize_rows(x, packed.quantizer)
    return lambda m: scaled_linear(rows[:m], packed, DTYPE)


def llm_int8(x: Tensor) -> Layer:
    packed, outliers = pack_llm_int8(weight(8, K), DTYPE), torch.tensor([3, 400], dtype=torch.int32)
    return lambda m: llm_int8_linear(x[:m], packed, 6.0, outliers)


LAYERS: dict[str, Callable[[Tensor], Layer]] = {
    "w4 g128": lambda x: weight_only(x, 4, 128),
    "w4 g32": lambda x: weight_only(x, 4, 32),
    "w8 e4m3": lambda x: weight_only(x, 8, 128, "e4m3"),
    "int8": lambda x: scaled(x, "int8", "int", -1, K),
    "fp8": lambda x: scaled(x, "e4m3", "e4m3", -1, K),
    "fp8 block": lambda x: scaled(x, "e4m3", "e4m3", 128, 128),
    "llm.int8": llm_int8,
}


def first_rows(name: str) -> list[Tensor]:
    """Of one batch's first token, computed in batches of several sizes."""
    torch.manual_seed(0)
    layer = LAYERS[name](torch.randn(max(BATCHES), K, dtype=DTYPE))
    return [layer(m)[0] for m in BATCHES]


@interpreter
@in_interpreter
@pytest.mark.usefixtures("triton_ops")
@pytest.mark.parametrize("name", LAYERS)
def test_a_token_has_the_same_bits_in_every_batch(name: str) -> None:
    set_batch_invariant(True)
    alone, *batched = first_rows(name)
    assert alone.isfinite().all()
    assert all(torch.equal(alone, row) for row in batched)


@interpreter
@in_interpreter
@pytest.mark.usefixtures("triton_ops")
def test_it_has_not_unless_that_is_asked_for() -> None:
    alone, *batched = first_rows("w4 g128")
    assert not all(torch.equal(alone, row) for row in batched)
