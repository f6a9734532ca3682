"""Checkpoints with 8-bit weights, and bitsandbytes' 4 bits: the engine computes what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit_kernels.wna16 import QuantizedWeight
from tests.bitsandbytes_encoder import encode
from tests.helpers import block_linears
from tests.integration.engines import EngineHost
from tests.integration.layers import ROWS, check_layers
from tests.integration.reference import assert_similar_scores, prompts, token_scores
from tests.reference_model import load_reference, merged_outputs
from tests.tiny_models import create_tiny_model
from vllm_quantkit.formats import Role, get_format
from vllm_quantkit.formats.bitsandbytes import assemble
from vllm_quantkit.quantize.checkpoint import exchange_layers, write_checkpoint
from vllm_quantkit.quantize.data_free import quantize_data_free
from vllm_quantkit.spec import (
    ALL_ROWS,
    PER_CHANNEL,
    ActivationSpec,
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

pytestmark = pytest.mark.engine

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
    config = {**get_format(spec.dialect).render(spec, ()), **case.config}
    exchange = exchange_layers(weights, spec, inputs)
    write_checkpoint(model_dir, out, exchange, {"quantization_config": config})
    layers = {name: (weight, spec) for name, weight in weights.items()}
    return load_reference(model_dir, layers, merged_static(inputs)), list(layers)


def serve_and_check(
    engines: EngineHost, folder: Path, method: str | None, reference: Any, count: int = 3
) -> None:
    model, layers = reference
    asked = prompts(count)
    outputs = merged_outputs(model, layers, ROWS)
    asks = [
        {"op": "score", "prompts": asked},
        {"op": "multiply", "layers": list(outputs), "rows": ROWS},
    ]
    result = engines.run(folder, method, asks)
    check_layers(result.answers[1], outputs)
    assert_similar_scores(result.answers[0], token_scores(model, asked))


@pytest.mark.parametrize("name", CASES)
def test_dialect(name, tmp_path, engines: EngineHost):
    model = create_tiny_model("llama", tmp_path / "model")
    reference = write_quantised(CASES[name], model, tmp_path / "quantised")
    # A scale of the whole batch: the prompts of one batch would share it.
    count = 1 if name.endswith("dynamic per tensor") else 3
    serve_and_check(engines, tmp_path / "quantised", CASES[name].method, reference, count)


@pytest.mark.parametrize(("code_type", "double"), [("nf4", True), ("fp4", False)])
def test_bitsandbytes_4_bits(code_type, double, tmp_path, engines: EngineHost):
    """No flag: vLLM 0.32 has no bitsandbytes, and 0.27's does not run on CPUs."""
    model_dir = create_tiny_model("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    weight = WeightSpec(bits=4, group_size=64, symmetric=True, code_type=code_type)
    spec = SchemeSpec(dialect="bitsandbytes", weight=weight)
    exchange, layers = {}, {}
    for name, linear in block_linears(model).items():
        stored, _ = encode(linear.weight.detach(), code_type, double=double)
        exchange[f"{name}.weight"] = {f"{name}.{key}": value for key, value in stored.items()}
        layers[name] = (_assembled(stored, linear.weight.shape, spec), spec)
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": code_type,
        "bnb_4bit_use_double_quant": double,
    }
    write_checkpoint(model_dir, tmp_path / "out", exchange, {"quantization_config": config})
    reference = load_reference(model_dir, layers), list(layers)
    serve_and_check(engines, tmp_path / "out", None, reference)


def _assembled(stored: Mapping[str, Tensor], size: torch.Size, spec: SchemeSpec) -> QuantizedWeight:
    shape = LayerShape(out_features=size[0], in_features=size[1])
    parts = assemble(stored, shape, spec)
    index = (torch.arange(size[1]) // spec.weight.group_size).int()
    zeros = torch.zeros_like(parts[Role.SCALES], dtype=torch.uint8)
    return QuantizedWeight(
        parts[Role.CODES], parts[Role.SCALES], zeros, index, 4, spec.weight.code_type
    )
