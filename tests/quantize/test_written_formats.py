"""transformers, through compressed-tensors' own code, reads exactly the weights that were made.

GPTQ and AWQ checkpoints it loads through GPTQModel, which is built for GPUs and is not installed
here; vLLM's own readers of both are in tests/integration/test_written_checkpoints.py.
"""

import hashlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.reference_model import load_reference
from tests.tiny_models import create_tiny_model
from tests.written_models import INPUT_SCALE, write_model
from tests.written_schemes import MIXED, MIXED_QUANTKIT, UNIFORM, by_part
from vllm_quantkit._safetensors import read_headers
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.quantize.output.verify import read_layer, verify_checkpoint, weight_digest

ACTIVATION_TOLERANCE = 0.05
"""Relative difference of logits where activations are quantised; else they are equal bit for bit.

The library's dynamic scale of int8 is the largest magnitude over 127.5, engines' over 127: 0.03
here. Others differ where a value next to a rounding boundary falls to its other side: 0.01.
"""

CASES = {**{name: by_part(scheme, {}) for name, scheme in UNIFORM.items()}, "mixed": MIXED}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return create_tiny_model("llama", tmp_path_factory.mktemp("llama") / "model", **sizes)


@torch.no_grad()
def logits(model):
    generator = torch.Generator().manual_seed(1)
    return model.eval()(torch.randint(4, 500, (2, 20), generator=generator)).logits


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_with_the_weights_that_were_made(case, source, tmp_path):
    written = write_model(source, tmp_path / "out", CASES[case])
    layers = {name: (weight, written.schemes[name]) for name, weight in written.weights.items()}
    scale = (torch.tensor([INPUT_SCALE]), None)
    static = {
        name: scale
        for name, (_, scheme) in layers.items()
        if scheme.activation and not scheme.activation.dynamic
    }
    expected = logits(load_reference(source, layers, static))

    model = AutoModelForCausalLM.from_pretrained(
        written.folder, dtype=torch.float32, attn_implementation="eager"
    )
    found = logits(model)

    for name, weight in written.weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight.dequantize()), name
    if any(scheme.activation for scheme in written.schemes.values()):
        assert (found - expected).norm() / expected.norm() <= ACTIVATION_TOLERANCE
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("scheme_for", [MIXED, MIXED_QUANTKIT], ids=["mixed", "quantkit"])
def test_what_was_written_is_verified(scheme_for, source, tmp_path):
    written = write_model(source, tmp_path / "out", scheme_for)
    verify_checkpoint(written.folder, written.records, written.schemes)
    for name, scheme in written.schemes.items():
        read = read_layer(written.folder, name, scheme)
        assert torch.equal(read.dequantize(), written.weights[name].dequantize())


def test_a_changed_bit_is_found(source, tmp_path):
    written = write_model(source, tmp_path / "out", by_part(UNIFORM["W4A16, group 32"], {}))
    path = written.folder / "model.safetensors"
    damaged = "model.layers.1.self_attn.v_proj"
    words = read_headers(written.folder)[f"{damaged}.weight_packed"]
    data = bytearray(path.read_bytes())
    data[words.offset + 5] ^= 16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{damaged}: its weight is not the one"):
        verify_checkpoint(written.folder, written.records, written.schemes)


def test_a_config_or_record_that_does_not_fit_is_found(source, tmp_path):
    written = write_model(source, tmp_path / "out", MIXED)
    name = "model.layers.0.self_attn.q_proj"
    other = {**written.schemes, name: UNIFORM["W4A16, group 64, asymmetric"]}
    with pytest.raises(CheckpointError, match=rf"{name}: its config says 4 bits, group 32, not"):
        verify_checkpoint(written.folder, written.records, other)
    with pytest.raises(CheckpointError, match=rf"{name}: no digest was noted"):
        verify_checkpoint(written.folder, written.records[1:], written.schemes)
    more = {**written.schemes, "model.layers.0.mlp.up_proj": written.schemes[name]}
    with pytest.raises(CheckpointError, match="up_proj: its config says 16 bits"):
        verify_checkpoint(written.folder, written.records, more)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_a_digest_is_that_of_the_bytes_row_by_row(rows):
    weight = torch.randn(rows, 7)
    whole = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    assert weight_digest(weight) == whole
    assert weight_digest(weight.t().contiguous().t()) == whole
    changed = weight.clone()
    changed[-1, -1] = torch.nextafter(changed[-1, -1], torch.tensor(10.0))
    assert weight_digest(changed) != whole
