"""The linear layers that `cpu_linear` compares: ours, bfloat16, and other people's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import Linear
from quantkit_kernels.act_quant import RowQuantizer, quantize_rows
from quantkit_kernels.code_types import CodeType, code_values
from quantkit_kernels.llm_int8 import llm_int8_linear, pack_llm_int8, reference_llm_int8
from quantkit_kernels.scaled_mm import pack_scaled, reference_scaled_linear, scaled_linear
from quantkit_kernels.wna16 import QuantizedWeight, pack_weight, reference_linear, wna16_linear

SIZE, GROUP_SIZE, WEIGHTS = 4096, 128, 10

BF16, ATEN, VLLM = "bf16", "ATen int4", "vLLM int4"
INT4, INT4_ASYMMETRIC, NF4, W8A16 = "int4", "int4 asym", "nf4", "W8A16"
W8A8, VLLM_W8A8, LLM_INT8 = "W8A8", "vLLM W8A8", "LLM.int8"
FP8, FP8_BLOCK = "FP8", "FP8 block"

OUTLIER_THRESHOLD, OUTLIER_EVERY, OUTLIER = 6.0, 100, 10.0
"""Every hundredth input channel is ten and more standard deviations large."""

OUR_MAX_ERROR = 2e-3
"""Relative to the norm of y: y rounded to bfloat16."""
ROUNDED_MAX_ERROR = 4e-3
"""The same with weights, or weights and scales, rounded to bfloat16."""
VLLM_MAX_ERROR = 6e-3
"""The same with sums in bfloat16 besides."""
INT8_ROWS_MAX_ERROR = 3e-2
"""Activations rounded to a 127th of their largest, an outlier."""

Make = Callable[[QuantizedWeight], Linear]
Reference = Callable[[Tensor, QuantizedWeight], Tensor]


@dataclass(frozen=True)
class Entry:
    """One implementation, and what it has to compute.

    Attributes:
        name: for tables.
        make: a layer from a weight.
        weight: a weight from a seed.
        reference: float32 y, from x and the weight.
        max_error: norm of the error over that of y.
    """

    name: str
    make: Make
    weight: Callable[[int], QuantizedWeight]
    reference: Reference = reference_linear
    max_error: float = OUR_MAX_ERROR


@dataclass(frozen=True)
class Contender:
    """One implementation over several weights, with what the first weight means."""

    entry: Entry
    layers: list[Linear]

    @property
    def name(self) -> str:
        """For tables."""
        return self.entry.name


def random_weight(
    seed: int,
    *,
    bits: int = 4,
    symmetric: bool = True,
    code_type: CodeType = "int",
    group_size: int = GROUP_SIZE,
) -> QuantizedWeight:
    """A 4096 x 4096 weight; codes of 8-bit floats are those of finite numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape, groups = (SIZE, SIZE), (SIZE, SIZE // group_size)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    if code_type == "e4m3":
        codes = codes.where(code_values(code_type).isfinite()[codes.long()], codes & 0x8F)
    zeros = torch.randint(0, 2**bits, groups, dtype=torch.uint8, generator=generator)
    return QuantizedWeight(
        codes=codes,
        scales=torch.rand(groups, generator=generator) * 0.02 + 1e-3,
        zeros=torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        group_index=(torch.arange(SIZE) // group_size).int(),
        bits=bits,
        code_type=code_type,
    )


def random_inputs(rows: int) -> Tensor:
    """bfloat16 [rows, 4096], 1 % of the channels outliers."""
    x = torch.randn(rows, SIZE)
    outliers = x[:, ::OUTLIER_EVERY]
    outliers += OUTLIER * outliers.sign()
    return x.bfloat16()


def bf16_linear(weight: QuantizedWeight) -> Linear:
    """F.linear with the dequantised weight."""
    dense = weight.dequantize().bfloat16()
    return lambda x: torch.nn.functional.linear(x, dense)


def our_linear(weight: QuantizedWeight) -> Linear:
    """16-bit activations."""
    packed = pack_weight(weight, torch.bfloat16)
    return lambda x: wna16_linear(x, packed)


def our_scaled(weight: QuantizedWeight, *, quantizer: RowQuantizer) -> Linear:
    """8-bit activations, quantised by each call."""
    packed = pack_scaled(weight, quantizer, torch.bfloat16)
    return lambda x: scaled_linear(quantize_rows(x, quantizer), packed, torch.bfloat16)


def our_llm_int8(weight: QuantizedWeight) -> Linear:
    """8-bit activations, outliers in 16 bits."""
    packed = pack_llm_int8(weight, torch.bfloat16)
    return lambda x: llm_int8_linear(x, packed, OUTLIER_THRESHOLD)


def scaled(
    name: str, quantizer: RowQuantizer, code_type: CodeType, group_size: int = SIZE
) -> Entry:
    """Our kernel for 8-bit weights and rows; the reference multiplies the same rows."""

    def reference(x: Tensor, weight: QuantizedWeight) -> Tensor:
        return reference_scaled_linear(quantize_rows(x, quantizer), weight, quantizer)

    weight = partial(random_weight, bits=8, code_type=code_type, group_size=group_size)
    return Entry(name, partial(our_scaled, quantizer=quantizer), weight, reference)


def entries() -> list[Entry]:
    """Everything to compare, bfloat16 first."""
    per_channel = partial(random_weight, bits=8, group_size=SIZE)
    asymmetric = partial(random_weight, symmetric=False)
    return [
        Entry(BF16, bf16_linear, random_weight, max_error=ROUNDED_MAX_ERROR),
        Entry(ATEN, peers.aten_int4, random_weight, max_error=ROUNDED_MAX_ERROR),
        Entry(VLLM, peers.vllm_int4, random_weight, max_error=VLLM_MAX_ERROR),
        Entry(INT4, our_linear, random_weight),
        Entry(INT4_ASYMMETRIC, our_linear, asymmetric),
        Entry(NF4, our_linear, partial(random_weight, code_type="nf4"), max_error=2.5e-3),
        Entry(W8A16, our_linear, partial(random_weight, bits=8)),
        Entry(VLLM_W8A8, peers.vllm_int8, per_channel, max_error=INT8_ROWS_MAX_ERROR),
        scaled(W8A8, RowQuantizer("int8"), "int"),
        scaled(FP8, RowQuantizer("e4m3"), "e4m3"),
        scaled(FP8_BLOCK, RowQuantizer("e4m3", GROUP_SIZE), "e4m3", GROUP_SIZE),
        Entry(LLM_INT8, our_llm_int8, per_channel, _llm_int8_reference),
    ]


def _llm_int8_reference(x: Tensor, weight: QuantizedWeight) -> Tensor:
    return reference_llm_int8(x, weight, OUTLIER_THRESHOLD)


def contenders(names: list[str]) -> list[Contender]:
    """All of `names` that can run here, or all; says which cannot, and why."""
    found = []
    for entry in entries():
        if names and entry.name not in names:
            continue
        try:
            layers = [entry.make(entry.weight(seed)) for seed in range(WEIGHTS)]
        except ImportError as error:
            print(f"{entry.name} is left out: {error}.")
            continue
        found.append(Contender(entry, layers))
    return found


def check(contender: Contender) -> float:
    """The relative error of the first layer, at several numbers of rows.

    Raises:
        ValueError: it is above the limit.
    """
    entry, worst = contender.entry, 0.0
    weight = entry.weight(0)
    for rows in (1, 13, 70):
        x = random_inputs(rows)
        expected = entry.reference(x, weight)
        error = (contender.layers[0](x).float() - expected).norm() / expected.norm()
        worst = max(worst, float(error))
    if not worst <= entry.max_error:
        raise ValueError(f"{entry.name} is off by {worst:.1e} of y, more than {entry.max_error}")
    return worst
