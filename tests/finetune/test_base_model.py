"""A frozen base computes, and passes gradients through, what its dequantised twin does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit_kernels.packing import stream_words
from quantkit_kernels.wna16 import QuantizedWeight
from tests.bitsandbytes_encoder import encode
from tests.helpers import QuantizedPair, block_linears, quantized_checkpoint
from tests.integration.at_load import AT_LOAD
from tests.integration.eight_bit import CASES, write_quantised
from tests.integration.schemes import awq, compressed, gptq, ruled_checkpoint
from tests.lora_adapters import PROJECTIONS, RANK, random_adapter
from tests.reference_model import quantize_as_at_load
from tests.tiny_models import create_tiny_model
from vllm_quantkit.errors import CheckpointError, ConfigError, UnsupportedScheme
from vllm_quantkit.finetune import FrozenLinear, load_frozen
from vllm_quantkit.formats import get_format
from vllm_quantkit.options import Options
from vllm_quantkit.quantize.output.checkpoint import write_checkpoint
from vllm_quantkit.schemes import get_method
from vllm_quantkit.schemes.at_load import load_rules
from vllm_quantkit.spec import LayerRules

TOLERANCE = 2e-5
"""Relative, in float32: the same weights, and only the order of sums differs. It makes 1e-6."""

TOKENS = torch.randint(4, 500, (2, 24), generator=torch.Generator().manual_seed(0))

HIDDEN, INNER = 256, 320

CHECKPOINTS = {
    "awq": awq(64),
    "gptq, act-order": gptq(4, 64, symmetric=False, act_order=True),
    "gptq, 3 bits": gptq(3, 128, symmetric=True),
    "compressed-tensors, ragged groups": compressed(5, 96, symmetric=False),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    return create_tiny_model("llama", folder, intermediate_size=INNER)


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(llama, tmp_path_factory.mktemp("lora") / "adapter")


def dense_twin(folder: Path, layers: Mapping[str, QuantizedWeight]) -> PreTrainedModel:
    """The 16-bit model in `folder` with dequantised weights, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in layers.items():
        linear, dense = model.get_submodule(name), layer.dequantize()
        linear.weight.data = dense.T.contiguous() if isinstance(linear, Conv1D) else dense
    return model.requires_grad_(False).eval()


def at_load_twin(folder: Path, method: str) -> PreTrainedModel:
    layers = quantize_as_at_load(folder, load_rules(get_method(method), Options()))
    return dense_twin(folder, {name: weight for name, (weight, _) in layers.items()})


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the loss of predicting `TOKENS`."""
    result = model(input_ids=TOKENS, labels=TOKENS)
    result.loss.backward()
    return result.logits.detach(), {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def check_adapted(frozen: PreTrainedModel, twin: PreTrainedModel, adapter: Path) -> None:
    """The same adapter on both: the same logits, and the same gradients of A and B."""
    with torch.no_grad():
        plain = frozen(TOKENS).logits
    assert relative_error(plain, twin(TOKENS).logits) <= TOLERANCE
    adapted = [PeftModel.from_pretrained(m, adapter, is_trainable=True) for m in (frozen, twin)]
    (logits, gradients), (expected_logits, expected) = map(loss_and_gradients, adapted)
    assert relative_error(logits, expected_logits) <= TOLERANCE
    assert relative_error(logits, plain) > 0.1
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 2 * 2 * len(PROJECTIONS)  # A and B in two blocks
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) <= TOLERANCE, name


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_trains_as_its_dequantised_twin(case, llama, adapter, tmp_path):
    pair = quantized_checkpoint(llama, CHECKPOINTS[case], tmp_path / "pair")

    check_adapted(load_frozen(pair.quantized), dense_twin(llama, pair.layers), adapter)


@pytest.mark.parametrize("case", CASES)
def test_an_eight_bit_checkpoint_trains_as_its_dequantised_twin(case, llama, adapter, tmp_path):
    reference, names = write_quantised(CASES[case], llama, tmp_path / "quantised")
    layers = {name: reference.get_submodule(name).weight for name in names}

    check_adapted(load_frozen(tmp_path / "quantised"), dense_twin(llama, layers), adapter)


@pytest.mark.parametrize(("code_type", "double"), [("nf4", True), ("fp4", False)])
def test_bitsandbytes_4_bits_train_as_their_dequantised_twin(
    code_type, double, llama, adapter, tmp_path
):
    """The layers that QLoRA's own code trains on."""
    twin, exchange = dense_twin(llama, {}), {}
    for name, linear in block_linears(twin).items():
        stored, linear.weight.data = encode(linear.weight.data, code_type, double=double)
        exchange[f"{name}.weight"] = {f"{name}.{tensor}": v for tensor, v in stored.items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    config |= {"bnb_4bit_quant_type": code_type, "bnb_4bit_use_double_quant": double}
    out = tmp_path / "quantised"
    write_checkpoint(llama, out, exchange, {"quantization_config": config})

    check_adapted(load_frozen(out), twin, adapter)


@pytest.mark.parametrize("method", AT_LOAD)
def test_a_16_bit_model_quantised_on_the_way_trains_as_its_dequantised_twin(method, llama, adapter):
    check_adapted(load_frozen(llama, method=method), at_load_twin(llama, method), adapter)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
def test_transposed_weights_biases_and_tied_heads(family, tmp_path):
    extra = {"tie_word_embeddings": True} if family == "qwen2" else {}
    model = create_tiny_model(family, tmp_path / "model", **extra)

    logits = load_frozen(model, method="quantkit-int8")(TOKENS).logits

    assert relative_error(logits, at_load_twin(model, "quantkit-int8")(TOKENS).logits) <= TOLERANCE


def test_a_quantised_head(llama, tmp_path):
    scheme = gptq(4, 64, symmetric=True)
    config = get_format("gptq").render({"lm_head": scheme}, ignore=())
    rules = LayerRules(default=scheme, lm_head=scheme)
    pair = ruled_checkpoint(llama, rules, config, tmp_path / "pair")

    model = load_frozen(pair.quantized, method="quantkit-gptq")

    assert isinstance(model.lm_head, FrozenLinear)
    twin = dense_twin(llama, pair.layers)
    assert relative_error(model(TOKENS).logits, twin(TOKENS).logits) <= TOLERANCE


@pytest.fixture
def pair(llama: Path, tmp_path: Path) -> QuantizedPair:
    return quantized_checkpoint(llama, awq(64), tmp_path / "pair")


def test_no_weight_is_held_dense_nor_kept_for_the_backward_pass(pair, adapter):
    model = load_frozen(pair.quantized)
    held = model.model.layers[0].mlp.up_proj
    N, K = INNER, HIDDEN
    # 4-bit codes; a float32 scale and a zero-point for each group; an index for each channel.
    expected = N * stream_words(K, 4) * 4 + N * (K // 64) * (4 + 1) + K * 4
    assert sum(tensor.nbytes for tensor in held.state_dict().values()) == expected
    assert held.weight.shape == (N, K)
    assert held.weight.untyped_storage().nbytes() == 4

    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        PeftModel.from_pretrained(model, adapter, is_trainable=True)(TOKENS)
    sizes = {tuple(sorted(tensor.shape)) for tensor in kept}
    assert (RANK, K) in sizes  # A and B are kept
    assert (K, N) not in sizes


def test_moving_to_another_dtype_rounds_no_scale(pair):
    model = load_frozen(pair.quantized, dtype=torch.bfloat16)
    name = "model.layers.1.self_attn.q_proj"

    layer = model.to(torch.float16).get_submodule(name)

    assert torch.equal(layer.dequantize(torch.float32), pair.layers[name].dequantize())
    assert layer(torch.ones(3, 256, dtype=torch.float16)).dtype is torch.float16


def test_the_base_cannot_be_trained(pair):
    model = load_frozen(pair.quantized)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()

    model.requires_grad_(True)

    trainable = {name for name, _ in model.named_parameters()}
    assert "model.embed_tokens.weight" in trainable
    assert not [name for name in trainable if name.split(".")[-2] in PROJECTIONS]


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_cannot_be_merged_into_it(safe, pair, adapter):
    model = PeftModel.from_pretrained(load_frozen(pair.quantized), adapter)
    with pytest.raises((RuntimeError, ValueError), match=r"single memory location|NaNs detected"):
        model.merge_and_unload(safe_merge=safe)


def test_a_16_bit_model_needs_a_method(llama):
    with pytest.raises(ConfigError, match="say how to quantise it"):
        load_frozen(llama)


def test_a_method_without_quantisation_at_load_is_refused(llama):
    with pytest.raises(UnsupportedScheme, match="serves checkpoints that are already quantised"):
        load_frozen(llama, method="quantkit-awq")


def test_options_are_for_16_bit_models(llama, pair):
    options = Options(ignore=("model.layers.0",), group_size=32)
    model = load_frozen(llama, method="quantkit-int4", options=options)
    kinds = [type(block.mlp.up_proj) for block in model.model.layers]
    assert kinds == [nn.Linear, FrozenLinear]
    with pytest.raises(ConfigError, match="group_size = 32 is for models that are quantised at"):
        load_frozen(pair.quantized, options=options)


def test_a_checkpoint_of_another_model_is_refused(pair):
    config = pair.quantized / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"layers\.1\..* in transformers' Llama.* is missing"):
        load_frozen(pair.quantized)
    config.write_text(json.dumps({**content, "intermediate_size": 640}))
    with pytest.raises(CheckpointError, match=r"is \[256, 320\] .* but \[256, 640\] in the model"):
        load_frozen(pair.quantized)
    config.write_text(json.dumps({**content, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers\.2\..* is not in the checkpoint"):
        load_frozen(pair.quantized)


def test_tensors_that_the_model_does_not_have_are_told(pair, caplog):
    edit_tensors(pair.quantized, lambda tensors: tensors | {"model.rotary": torch.ones(4)})
    load_frozen(pair.quantized)
    assert "model.rotary is not in the model and left out (1 such tensors)" in caplog.text


def test_a_damaged_scale_is_refused(pair):
    name = "model.layers.1.mlp.up_proj"
    edit_tensors(pair.quantized, lambda t: t | {f"{name}.scales": t[f"{name}.scales"] * torch.nan})
    with pytest.raises(CheckpointError, match=rf"{name} has a scale that is not finite"):
        load_frozen(pair.quantized)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
