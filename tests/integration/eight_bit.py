"""Checkpoints with 8-bit weights, in every dialect, and their references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.helpers import block_linears
from tests.reference_model import load_reference
from vllm_quantkit.formats import Role, get_format
from vllm_quantkit.quantize.methods.data_free import quantize_data_free
from vllm_quantkit.quantize.output.checkpoint import exchange_layers, write_checkpoint
from vllm_quantkit.spec import (
    ALL_ROWS,
    PER_CHANNEL,
    ActivationSpec,
    SchemeSpec,
    WeightSpec,
)

FLOAT = WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True, code_type="e4m3")
TENSOR = FLOAT.model_copy(update={"scale_rows": ALL_ROWS})
BLOCKS = FLOAT.model_copy(update={"scale_rows": 128, "group_size": 128})
INT = WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True)
STATIC = {"dynamic": False, "group_size": 0}
TOKEN_FP8, TOKEN_INT8 = ActivationSpec(code="e4m3"), ActivationSpec(code="int8")


@dataclass(frozen=True)
class Case:
    """A scheme, and the method that serves it.

    Attributes:
        config: keys of the `quantization_config` that differ from what we write.
    """

    method: str
    spec: SchemeSpec
    config: Mapping[str, Any] = field(default_factory=dict)


def fp8(weight: WeightSpec, activation: ActivationSpec | None) -> SchemeSpec:
    return SchemeSpec(dialect="fp8", weight=weight, activation=activation)


def plain(variant: str, weight: WeightSpec, activation: ActivationSpec | None = None) -> SchemeSpec:
    return SchemeSpec(
        dialect="compressed-tensors", variant=variant, weight=weight, activation=activation
    )


CASES = {
    "fp8 static per tensor": Case(
        "quantkit-fp8", fp8(TENSOR, ActivationSpec(code="e4m3", **STATIC))
    ),
    "fp8 dynamic per tensor": Case("quantkit", fp8(TENSOR, TOKEN_FP8)),
    "fp8 blocks": Case(
        "quantkit-fp8-block", fp8(BLOCKS, ActivationSpec(code="e4m3", group_size=128))
    ),
    "fp8 of E5M2 weights": Case(
        "quantkit-fp8", fp8(TENSOR.model_copy(update={"code_type": "e5m2"}), TOKEN_FP8)
    ),
    "float-quantized per channel": Case("quantkit-fp8", plain("float-quantized", FLOAT, TOKEN_FP8)),
    "float-quantized per tensor, dynamic per tensor": Case(
        "quantkit", plain("float-quantized", TENSOR, ActivationSpec(code="e4m3", group_size=0))
    ),
    "float-quantized blocks": Case(
        "quantkit", plain("float-quantized", BLOCKS, ActivationSpec(code="e4m3", group_size=128))
    ),
    "float-quantized weights alone": Case("quantkit-fp8", plain("float-quantized", FLOAT)),
    "fbgemm": Case(
        "quantkit-fp8",
        SchemeSpec(
            dialect="fbgemm_fp8",
            weight=FLOAT,
            activation=ActivationSpec(code="e4m3", upper_bound=1.5),
        ),
    ),
    "int-quantized per token": Case(
        "quantkit-smoothquant", plain("int-quantized", INT, TOKEN_INT8)
    ),
    "int-quantized static": Case(
        "quantkit-smoothquant",
        plain("int-quantized", INT, ActivationSpec(code="int8", **STATIC)),
    ),
    "int-quantized static asymmetric": Case(
        "quantkit",
        plain("int-quantized", INT, ActivationSpec(code="int8", symmetric=False, **STATIC)),
    ),
    "int-quantized, zero-points of weights and tokens": Case(
        "quantkit",
        plain(
            "int-quantized",
            INT.model_copy(update={"symmetric": False}),
            ActivationSpec(code="int8", symmetric=False),
        ),
    ),
    "naive-quantized weights alone": Case("quantkit-int8", plain("naive-quantized", INT)),
    "bitsandbytes int8": Case(
        "quantkit-llm-int8",
        SchemeSpec(
            dialect="bitsandbytes",
            weight=INT,
            activation=ActivationSpec(code="int8", outlier_threshold=2.5),
        ),
    ),
}


def static_inputs(spec: SchemeSpec, number: int) -> dict[Role, Tensor]:
    """What a checkpoint stores of static activations; layers of a merged one differ."""
    if spec.activation is None or spec.activation.dynamic:
        return {}
    inputs = {Role.INPUT_SCALE: torch.tensor([0.02 + 0.001 * (number % 7)])}
    if not spec.activation.symmetric:
        inputs[Role.INPUT_ZERO] = torch.tensor([float(number % 5 - 2)])
    return inputs


def merged_static(
    inputs: Mapping[str, Mapping[Role, Tensor]],
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """The one scale and zero-point of each merged layer's input: they cover all its layers'."""
    merged = {}
    for name in inputs:
        together = [other for other in inputs if _merges(name, other)]
        scales = torch.cat([inputs[other][Role.INPUT_SCALE] for other in together])
        if Role.INPUT_ZERO not in inputs[name]:
            merged[name] = (scales.max().reshape(1), None)
            continue
        zeros = torch.cat([inputs[other][Role.INPUT_ZERO] for other in together])
        low, high = ((-128 - zeros) * scales).min(), ((127 - zeros) * scales).max()
        scale = (high - low) / 255 if len(together) > 1 else scales[0]
        zero = torch.round(-128 - low / scale) if len(together) > 1 else zeros[0]
        merged[name] = (scale.reshape(1), zero.reshape(1))
    return merged


def _merges(name: str, other: str) -> bool:
    block, leaf = name.rpartition(".")[::2]
    other_block, other_leaf = other.rpartition(".")[::2]
    groups = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
    return block == other_block and (
        leaf == other_leaf or any({leaf, other_leaf} <= group for group in groups)
    )


def write_quantised(case: Case, model_dir: Path, out: Path) -> Any:
    """The checkpoint of a case in `out`; returns the reference model."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    spec = case.spec
    weights = {
        name: quantize_data_free(linear.weight.detach(), spec.weight, "none")
        for name, linear in block_linears(model).items()
    }
    inputs = {name: static_inputs(spec, i) for i, name in enumerate(weights)}
    inputs = {name: stored for name, stored in inputs.items() if stored}
    config = {**get_format(spec.dialect).render(dict.fromkeys(weights, spec), ()), **case.config}
    exchange = exchange_layers(weights, spec, inputs)
    write_checkpoint(model_dir, out, exchange, {"quantization_config": config})
    layers = {name: (weight, spec) for name, weight in weights.items()}
    return load_reference(model_dir, layers, merged_static(inputs)), list(layers)
