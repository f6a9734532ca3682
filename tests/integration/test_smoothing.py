"""Smoothing at load changes no function, and a smoothed engine computes what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.helpers import block_linears
from tests.integration.engines import EngineFailed, EngineHost
from tests.integration.layers import ROWS, check_layers
from tests.integration.reference import assert_similar_scores, prompts, token_scores
from tests.reference_model import ReferenceLinear, merged_outputs
from tests.smoothed_model import smooth
from tests.tiny_models import COMMON, create_tiny_model
from vllm_quantkit.options import LayerOptions
from vllm_quantkit.quantize.activation_stats import (
    collect_activation_stats,
    write_activation_stats,
)
from vllm_quantkit.quantize.methods.data_free import quantize_data_free
from vllm_quantkit.schemes.smoothquant import SmoothQuant

pytestmark = pytest.mark.engine

METHOD = "quantkit-smoothquant"
SPEC = SmoothQuant.at_load(LayerOptions())
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

GEMMA_NORM_TOLERANCE = 1e-6
"""(1 + w) / s - 1 is rounded to float32; 1 + w stays near 1."""

GEMMA_LOGIT_TOLERANCE = 1e-5
"""Of the largest logit: those roundings, through two blocks."""


def load(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def uneven_stats(folder: Path) -> dict[str, Tensor]:
    """The maxima over the prompts, each channel's off by a factor of up to 4."""
    stats = collect_activation_stats(load(folder), [torch.tensor([p]) for p in prompts()])
    generator = torch.Generator().manual_seed(0)
    return {
        name: largest * 16 ** (torch.rand(largest.shape, generator=generator) - 0.5)
        for name, largest in stats.items()
    }


class Case:
    """A tiny model, its statistics, and the same model smoothed."""

    def __init__(self, family: str, out: Path, **extra: Any) -> None:
        self.folder = create_tiny_model(family, out / "model", **extra)
        self.stats = uneven_stats(self.folder)
        self.file = out / "stats.safetensors"
        write_activation_stats(self.stats, self.file, tokens=123)
        self.smoothed = load(self.folder)
        self.factors = smooth(self.smoothed, self.stats)

    def quantised(self) -> PreTrainedModel:
        """The smoothed model with 8-bit weights and activations."""
        model = load(self.folder)
        smooth(model, self.stats)
        for name, linear in block_linears(model).items():
            weight = quantize_data_free(linear.weight.detach(), SPEC.weight, "none")
            model.set_submodule(name, ReferenceLinear(weight, linear.bias, SPEC.activation))
        return model

    def run(self, engines: EngineHost, asks: list[dict[str, Any]], **options: Any):
        config = {"quantkit": {"activation_stats": str(self.file)}}
        return engines.run(self.folder, METHOD, asks, additional_config=config, **options)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_smoothed_model_has_the_same_logits(family, tmp_path):
    """What the engine is compared with below is exact: bit by bit, except for 1 + w."""
    case = Case(family, tmp_path)
    tokens = torch.tensor([prompts()[0]])

    with torch.no_grad():
        expected, found = load(case.folder)(tokens).logits, case.smoothed(tokens).logits

    assert all(len(s.unique()) > 2 for s in case.factors.values())
    if family == "gemma2":
        assert (found - expected).abs().max() <= GEMMA_LOGIT_TOLERANCE * expected.abs().max()
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_an_engine_smooths_and_quantises_as_written_out(family, tmp_path, engines: EngineHost):
    case = Case(family, tmp_path)
    reference = case.quantised()
    outputs = merged_outputs(reference, block_linears(load(case.folder)), ROWS)
    fed = [f"model.layers.{i}.{norm}.weight" for i in range(2) for norm in norms(family)]

    result = case.run(
        engines,
        [
            {"op": "score", "prompts": prompts()},
            {"op": "multiply", "layers": list(outputs), "rows": ROWS},
            {"op": "parameters", "names": fed},
        ],
    )

    check_layers(result.answers[1], outputs)
    (weights,) = result.answers[2]
    for name, weight in zip(fed, weights, strict=True):
        expected = case.smoothed.get_parameter(name)
        tolerance = GEMMA_NORM_TOLERANCE if family == "gemma2" else 0
        assert (torch.tensor(weight) - expected).abs().max() <= tolerance, name
    assert_similar_scores(result.answers[0], token_scores(reference, prompts()))
    assert any("smoothed 8 layers, folded into what feeds them" in line for line in result.log)


def norms(family: str) -> tuple[str, str]:
    second = "pre_feedforward" if family == "gemma2" else "post_attention"
    return "input_layernorm", f"{second}_layernorm"


def test_two_ranks_smooth_as_one_does(tmp_path, engines: EngineHost):
    """Each folds its own rows of the bias: it has one of two key-value heads."""
    case = Case("qwen2", tmp_path)
    norm = "model.layers.1.input_layernorm.weight"
    bias = "model.layers.1.self_attn.qkv_proj.bias"
    asks = [{"op": "score", "prompts": prompts()}, {"op": "parameters", "names": [norm, bias]}]

    answers = case.run(engines, asks, env=TWO_RANKS, tensor_parallel_size=2).answers

    assert_similar_scores(answers[0], token_scores(case.quantised(), prompts()))
    attention = case.smoothed.model.layers[1].self_attn
    biases = [layer.bias for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    for rank, (found_norm, found_bias) in enumerate(answers[1]):
        expected = torch.cat([bias.chunk(2)[rank] for bias in biases])
        assert torch.equal(torch.tensor(found_bias), expected)
        assert torch.equal(torch.tensor(found_norm), case.smoothed.get_parameter(norm))


def unmerged(phi3: Path, out: Path) -> Path:
    """The Llama with the weights of a Phi 3, which stores q, k and v, gate and up, as one."""
    tensors = load_file(phi3 / "model.safetensors")
    for name in [name for name in tensors if "qkv_proj" in name or "gate_up_proj" in name]:
        merged, heads = tensors.pop(name), COMMON["head_dim"]
        qkv = [COMMON["num_attention_heads"] * heads] + 2 * [COMMON["num_key_value_heads"] * heads]
        parts = {"qkv_proj": qkv, "gate_up_proj": 2 * [COMMON["intermediate_size"]]}
        leaf = name.split(".")[-2]
        for letters, part in zip(split_names(leaf), merged.split(parts[leaf]), strict=True):
            tensors[name.replace(leaf, letters)] = part
    model = LlamaForCausalLM(LlamaConfig(**COMMON, rms_norm_eps=1e-5)).bfloat16()
    model.load_state_dict(tensors)
    model.save_pretrained(out)
    return out


def split_names(leaf: str) -> tuple[str, ...]:
    return ("q_proj", "k_proj", "v_proj") if leaf == "qkv_proj" else ("gate_proj", "up_proj")


def test_layers_merged_in_the_file_are_smoothed_as_those_merged_by_vllm(tmp_path, engines):
    phi3 = create_tiny_model("phi3", tmp_path / "phi3")
    stats = uneven_stats(phi3)
    split = {
        name.replace(leaf, part): largest.clone()
        for name, largest in stats.items()
        for leaf in [name.rpartition(".")[2]]
        for part in (split_names(leaf) if leaf in ("qkv_proj", "gate_up_proj") else (leaf,))
    }
    write_activation_stats(stats, tmp_path / "merged", tokens=123)
    write_activation_stats(split, tmp_path / "split", tokens=123)
    llama = unmerged(phi3, tmp_path / "llama")

    results = [
        engines.run(
            folder,
            METHOD,
            [{"op": "score", "prompts": prompts()}],
            additional_config={"quantkit": {"activation_stats": str(tmp_path / file)}},
            skip_tokenizer_init=True,
        )
        for folder, file in ((phi3, "merged"), (llama, "split"))
    ]

    assert all("smoothed 8 layers" in result.log[-1] for result in results)
    assert results[0].answers == results[1].answers


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("llama"))


def test_without_statistics_the_log_says_in_a_line_how_to_smooth(llama, engines: EngineHost):
    log = engines.run(llama.folder, METHOD, []).log

    (line,) = [line for line in log if line.startswith("WARNING")]
    assert "smoothing needs the largest input of every channel" in line
    assert "quantkit calibrate MODEL --calibration TEXT --out FILE" in line
    assert '--additional-config \'{"quantkit": {"activation_stats": "FILE"}}\'' in line
    assert not any("smoothed" in line for line in log)


def test_a_model_that_cannot_be_smoothed_is_served_with_a_warning(tmp_path, engines):
    folder = create_tiny_model("gpt2", tmp_path / "gpt2")
    write_activation_stats({"h.0.attn.c_attn": torch.ones(256)}, tmp_path / "stats", tokens=1)
    config = {"quantkit": {"activation_stats": str(tmp_path / "stats")}}

    log = engines.run(folder, METHOD, [], additional_config=config).log

    (line,) = [line for line in log if line.startswith("WARNING")]
    assert "this model has none of them" in line


def test_a_smoothed_model_refuses_to_reload_its_weights(llama, engines: EngineHost):
    with pytest.raises(EngineFailed) as failure:
        llama.run(engines, [{"op": "reload"}])

    assert "cannot be reloaded, because activation_stats smoothed the model" in str(failure.value)
    assert "start the engine again" in str(failure.value)


def without_a_layer(stats: dict[str, Tensor]) -> None:
    del stats["model.layers.1.mlp.down_proj"]


def too_narrow(stats: dict[str, Tensor]) -> None:
    stats["model.layers.1.self_attn.o_proj"] = torch.ones(128)


def not_finite(stats: dict[str, Tensor]) -> None:
    stats["model.layers.0.mlp.up_proj"][3] = torch.nan


FAULTS = {
    without_a_layer: ("no entry for model.layers.1.mlp.down_proj", "collect the statistics"),
    too_narrow: ("o_proj are for 128 input channels, but the layer has 256", "from this model"),
    not_finite: ("statistics of model.layers.0.mlp.up_proj have a value", "collect them"),
}
"""What is done to the statistics, and what the engine says."""


@pytest.mark.parametrize("spoil", FAULTS)
def test_statistics_that_do_not_fit_are_refused(spoil, llama, tmp_path, engines: EngineHost):
    stats = {name: largest.clone() for name, largest in llama.stats.items()}
    spoil(stats)
    write_activation_stats(stats, tmp_path / "spoilt", tokens=1)
    config = {"quantkit": {"activation_stats": str(tmp_path / "spoilt")}}

    with pytest.raises(EngineFailed) as failure:
        engines.run(llama.folder, METHOD, [], additional_config=config)

    assert all(part in str(failure.value) for part in FAULTS[spoil])


def test_a_missing_file_of_statistics_is_refused(llama, engines: EngineHost):
    config = {"quantkit": {"activation_stats": "/nowhere/stats"}}

    with pytest.raises(EngineFailed, match="there is no file '/nowhere/stats'"):
        engines.run(llama.folder, METHOD, [], additional_config=config)
