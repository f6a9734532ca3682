"""Checkpoints with 8-bit weights, and bitsandbytes' 4 bits: the engine computes what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit_kernels.wna16 import QuantizedWeight
from tests.bitsandbytes_encoder import encode
from tests.helpers import block_linears
from tests.integration.eight_bit import CASES, write_quantised
from tests.integration.engines import EngineHost
from tests.integration.footprints import MEMORY, check_footprint
from tests.integration.foreseen import check_log
from tests.integration.layers import ROWS, check_layers
from tests.integration.reference import assert_similar_scores, prompts, token_scores
from tests.reference_model import load_reference, merged_outputs
from tests.tiny_models import create_tiny_model
from vllm_quantkit.formats import Role
from vllm_quantkit.formats.bitsandbytes import assemble
from vllm_quantkit.quantize.output.checkpoint import write_checkpoint
from vllm_quantkit.spec import (
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

pytestmark = pytest.mark.engine


def serve_and_check(
    engines: EngineHost, folder: Path, method: str | None, reference: Any, count: int = 3
) -> None:
    model, layers = reference
    asked = prompts(count)
    outputs = merged_outputs(model, layers, ROWS)
    asks = [
        {"op": "score", "prompts": asked},
        {"op": "multiply", "layers": list(outputs), "rows": ROWS},
        MEMORY,
    ]
    result = engines.run(folder, method, asks)
    check_layers(result.answers[1], outputs)
    check_footprint(result.answers[2], folder, method or "quantkit")
    check_log(result.log, folder, method)
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
