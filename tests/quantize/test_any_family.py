"""The helpers that other tests build checkpoints with: every family, every dialect."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import quantized_checkpoint
from tests.tiny_models import TINY_MODELS, create_tiny_model
from vllm_quantkit.checkpoint import audit, read_headers, read_quantization_config
from vllm_quantkit.formats import get_format
from vllm_quantkit.spec import SchemeSpec, WeightSpec

SCHEMES = [
    SchemeSpec(
        dialect="awq", weight=WeightSpec(bits=4, group_size=64, symmetric=False), variant="gemm"
    ),
    SchemeSpec(
        dialect="gptq",
        weight=WeightSpec(bits=8, group_size=64, symmetric=True, act_order=True),
        variant="gptq",
    ),
    SchemeSpec(
        dialect="compressed-tensors",
        weight=WeightSpec(bits=8, group_size=-1, symmetric=True),
        variant="pack-quantized",
    ),
]

LINEARS = {"phi3": 8, "gpt2": 8}
"""Linear layers in two blocks; 14 in all other families."""


@pytest.fixture(scope="module", params=TINY_MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return request.param, create_tiny_model(
        request.param, tmp_path_factory.mktemp(request.param) / "model"
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.dialect)
def test_checkpoint_passes_the_audit_and_its_twin_resembles_the_model(
    family: tuple[str, Path], scheme: SchemeSpec, tmp_path: Path
):
    name, source = family
    pair = quantized_checkpoint(source, scheme, tmp_path)
    rules = get_format(scheme.dialect).parse(read_quantization_config(pair.quantized))
    found = audit(read_headers(pair.quantized), rules)
    assert set(found.quantised) == set(pair.layers)
    assert len(found.quantised) == LINEARS.get(name, 14)
    assert found.plain == ()
    tokens = torch.arange(2, 34)[None]
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float()
        for folder in (source, pair.twin)
    ]
    with torch.no_grad():
        expected, actual = (model(tokens).logits for model in models)
    limit = 0.04 if scheme.weight.bits == 8 else 0.4
    assert 0 < float((actual - expected).norm() / expected.norm()) < limit


def test_logits_are_neither_flat_nor_one_hot(family: tuple[str, Path]):
    name, source = family
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert len(tokenizer) == model.config.vocab_size, name
    tokens = tokenizer("Licensed under the Apache License", return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
    assert 2 < float(output.logits.std()) < 4
    assert 0.1 < float(output.logits.softmax(-1).amax(-1).mean()) < 0.7
    assert all(float(hidden.std()) < 20 for hidden in output.hidden_states)


def test_ignored_layers_stay_as_they_are(tmp_path: Path):
    source = create_tiny_model("llama", tmp_path / "llama")
    kept = "model.layers.1.mlp.down_proj"
    pair = quantized_checkpoint(source, SCHEMES[0], tmp_path, ignore=("lm_head", kept))
    stored = load_file(pair.quantized / "model.safetensors")
    assert torch.equal(
        stored[f"{kept}.weight"], load_file(source / "model.safetensors")[f"{kept}.weight"]
    )
    assert kept not in pair.layers
    assert len(pair.layers) == 13
