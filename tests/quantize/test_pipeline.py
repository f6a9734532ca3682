import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quantkit_kernels.wna16 import QuantizedWeight
from tests.tiny_models import create_tiny_model
from vllm_quantkit.errors import CheckpointError, QuantkitError, UnsupportedScheme
from vllm_quantkit.formats import Role, get_format
from vllm_quantkit.quantize.calibration import token_windows
from vllm_quantkit.quantize.methods import METHODS, Awq, Gptq, Rtn
from vllm_quantkit.quantize.pipeline import quantize_folder, quantize_model
from vllm_quantkit.spec import LayerShape, SchemeSpec, WeightSpec

ASYMMETRIC = WeightSpec(bits=4, group_size=64, symmetric=False)
SYMMETRIC = WeightSpec(bits=4, group_size=64, symmetric=True)
AWQ = SchemeSpec(dialect="awq", weight=ASYMMETRIC, variant="gemm")
GPTQ = SchemeSpec(dialect="gptq", weight=SYMMETRIC, variant="gptq")
ACT_ORDER = SchemeSpec(
    dialect="gptq",
    weight=WeightSpec(bits=3, group_size=32, symmetric=False, act_order=True),
    variant="gptq_v2",
)
PACKED = SchemeSpec(dialect="compressed-tensors", weight=ASYMMETRIC)


def batches(count: int = 4) -> list[Tensor]:
    tokens = torch.randint(2, 512, (count, 2, 64), generator=torch.Generator().manual_seed(0))
    return list(tokens)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(torch.cat(batches())).logits


def decode(folder: Path, layer: str, scheme: SchemeSpec, shape: tuple[int, int]) -> Tensor:
    stored = load_file(folder / "model.safetensors")
    size = LayerShape(out_features=shape[0], in_features=shape[1])
    tensors = get_format(scheme.dialect).tensors(scheme, size)
    for tensor in tensors:
        assert stored[f"{layer}.{tensor.name}"].shape == tensor.shape
        assert stored[f"{layer}.{tensor.name}"].dtype == tensor.dtypes[0]
    values = {t.role: t.decode(stored[f"{layer}.{t.name}"]) for t in tensors}
    order = torch.arange(shape[1]) // scheme.weight.group_size
    zeros = torch.full_like(values[Role.SCALES], 2 ** (scheme.weight.bits - 1))
    return QuantizedWeight(
        codes=values[Role.CODES],
        scales=values[Role.SCALES],
        zeros=values.get(Role.ZEROS, zeros),
        group_index=values.get(Role.GROUP_INDEX, order.to(torch.int32)),
        bits=scheme.weight.bits,
    ).dequantize()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("awq", AWQ), ("gptq", GPTQ), ("gptq", ACT_ORDER), ("awq", PACKED), ("rtn", PACKED)],
)
def test_what_is_written_is_what_was_measured(
    name: str, scheme: SchemeSpec, llama: Path, tmp_path: Path
):
    out = tmp_path / "out"
    model, result = quantize_folder(llama, out, scheme, METHODS[name], batches())
    assert len(result.layers) == 14
    parameters = dict(model.named_parameters())
    for layer in result.layers:
        weight = parameters[f"{layer}.weight"].detach()
        assert torch.equal(decode(out, layer, scheme, tuple(weight.shape)), weight)
    stored, original = (load_file(folder / "model.safetensors") for folder in (out, llama))
    kept = {key for key in original if not key.removesuffix(".weight").endswith("_proj")}
    for key in kept:
        assert stored[key].dtype == original[key].dtype
        assert torch.equal(stored[key].float(), parameters[key].detach())
    assert set(stored) - kept == {key for key in stored if key.rsplit(".", 1)[0] in result.layers}
    assert {key for key in kept if not torch.equal(stored[key], original[key])} == set(
        result.changed
    )


def test_config_tokenizer_and_template_come_along(llama: Path, tmp_path: Path):
    out = tmp_path / "out"
    quantize_folder(llama, out, AWQ, Rtn, batches())
    config = json.loads((out / "config.json").read_text())
    rules = get_format("awq").parse(config.pop("quantization_config"))
    assert config == json.loads((llama / "config.json").read_text())
    assert rules.scheme_for("model.layers.0.self_attn.q_proj") == AWQ
    assert rules.scheme_for("lm_head") is None
    copied = {path.name for path in llama.iterdir()}
    assert {path.name for path in out.iterdir()} == copied
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= copied
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no temporary folder stays"


@pytest.mark.parametrize(("name", "scheme"), [("awq", AWQ), ("gptq", ACT_ORDER)])
def test_same_input_same_bytes(name: str, scheme: SchemeSpec, llama: Path, tmp_path: Path):
    for out in (tmp_path / "a", tmp_path / "b"):
        quantize_folder(llama, out, scheme, METHODS[name], batches())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


class Unrounded:
    """Gives every weight back as it is, to see what folding alone does."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach().clone()

    def dequantize(self) -> Tensor:
        return self.weight


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped", "one-to-one"])
def test_folding_alone_changes_no_logits(
    family: str, kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    model = load(create_tiny_model(family, tmp_path, num_key_value_heads=kv_heads, **sizes))
    before, norm = logits(model), model.model.layers[0].input_layernorm.weight.clone()
    monkeypatch.setattr(Awq, "quantize", lambda _, weight, stats: Unrounded(weight))
    result = quantize_model(model, Awq(ASYMMETRIC), batches(), dtype=torch.float32)
    assert not torch.allclose(norm, model.model.layers[0].input_layernorm.weight)
    assert max(result.errors.values()) == 0
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_methods_rank_as_they_should(llama: Path):
    reference = logits(load(llama))
    spec = WeightSpec(bits=3, group_size=64, symmetric=False)
    errors = {}
    for method in (Rtn(spec), Awq(spec), Gptq(spec)):
        model = load(llama)
        result = quantize_model(model, method, batches(8), dtype=torch.bfloat16)
        errors[type(method)] = sum(result.errors.values())
        assert float((logits(model) - reference).norm() / reference.norm()) < 1
    assert errors[Gptq] < errors[Rtn]
    assert errors[Awq] < errors[Rtn]


def test_sharded_sources_give_sharded_checkpoints(llama: Path, tmp_path: Path):
    load(llama).bfloat16().save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    quantize_folder(tmp_path / "shards", tmp_path / "out", GPTQ, Rtn, batches())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 1
    assert index["weight_map"] == {key: name for name, file in files.items() for key in file}
    sizes = (tensor.nbytes for file in files.values() for tensor in file.values())
    assert index["metadata"]["total_size"] == sum(sizes)


def test_an_existing_folder_is_never_overwritten(llama: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="already exists"):
        quantize_folder(llama, tmp_path, GPTQ, Rtn, batches())


def test_a_model_type_without_a_map_is_refused(tmp_path: Path):
    create_tiny_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(UnsupportedScheme, match="'gpt2' cannot be quantised yet, only those"):
        quantize_folder(tmp_path / "gpt2", tmp_path / "out", GPTQ, Rtn, batches())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "broken", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_broken_parameter_is_named(broken: str, llama: Path):
    model = load(llama)
    model.get_parameter(broken).data[0, 0] = float("nan")
    with pytest.raises(QuantkitError, match=f"{re.escape(broken)}: the weight has 1 NaN"):
        quantize_model(model, Awq(ASYMMETRIC), batches(), dtype=torch.bfloat16)


def test_a_layer_that_no_scale_can_hold_is_named(llama: Path):
    model = load(llama)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e9)
    with pytest.raises(QuantkitError, match=r"model\.layers\.1\.mlp\.up_proj: a scale of"):
        quantize_model(model, Rtn(SYMMETRIC), batches(), dtype=torch.bfloat16)


def test_names_that_differ_from_the_model_are_refused(llama: Path, tmp_path: Path):
    source = tmp_path / "renamed"
    load(llama).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    bare = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has no tensor 'model"):
        quantize_folder(source, tmp_path / "out", GPTQ, partial(Gptq, clip=False), batches())
    assert not (tmp_path / "out").exists()


def test_calibration_windows_are_seeded_and_do_not_overlap(llama: Path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    text = " ".join(str(number) for number in range(2000))
    windows = token_windows(text, tokenizer, count=6, length=32, seed=1)
    assert windows.shape == (6, 32)
    assert torch.equal(windows, token_windows(text, tokenizer, count=6, length=32, seed=1))
    assert not torch.equal(windows, token_windows(text, tokenizer, count=6, length=32, seed=2))
    assert len({tuple(window.tolist()) for window in windows}) == 6
    with pytest.raises(QuantkitError, match="need 320000 tokens, but the text has"):
        token_windows(text, tokenizer, count=10000, length=32)
