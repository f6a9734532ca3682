"""LoRA adapters made by `peft` over every scheme: y = base(x) + scale B A x."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quantkit_kernels.wna16 import QuantizedWeight
from tests.helpers import quantized_checkpoint
from tests.integration.at_load import AT_LOAD
from tests.integration.engines import TWO_RANKS, EngineFailed, EngineHost
from tests.integration.layers import ROWS, check_layers
from tests.integration.reference import (
    FLIPPED_TOLERANCE,
    assert_same_scores,
    assert_similar_scores,
    mean_difference,
    prompts,
    token_scores,
)
from tests.integration.schemes import awq, compressed, gptq, ruled_checkpoint
from tests.lora_adapters import random_adapter, with_adapter
from tests.reference_model import load_reference, merged_outputs, quantize_as_at_load
from tests.tiny_models import create_tiny_model
from vllm_quantkit.formats import get_format
from vllm_quantkit.options import Options
from vllm_quantkit.quantize.activation_stats import write_activation_stats
from vllm_quantkit.schemes import get_method
from vllm_quantkit.schemes.at_load import load_rules
from vllm_quantkit.spec import LayerRules, SchemeSpec

pytestmark = pytest.mark.engine

LORA = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8, "max_num_seqs": 1}
"""One prompt at a time: on CPU vLLM's own head with adapters cannot score several at once."""

CHECKPOINTS = {
    "quantkit-awq": awq(64),
    "quantkit-gptq": gptq(4, 64, symmetric=True, act_order=True),
    "quantkit": compressed(8, -1, symmetric=True),
}
"""Flag to a checkpoint it serves, beside the methods that quantise at load."""

NEW_TOKENS = 16

ACTS = 5 * FLIPPED_TOLERANCE
"""What an adapter changes at least, mean |difference| of log-probabilities; ours changes 2.6."""


@dataclass(frozen=True)
class Case:
    """A model to serve, an adapter for it, and the layers that it should hold.

    Attributes:
        folder: what is served.
        model: the same in 16 bits.
    """

    folder: Path
    model: Path
    adapter: Path
    layers: dict[str, tuple[QuantizedWeight, SchemeSpec]]

    @property
    def same_scores(self) -> bool:
        """True where no activation is rounded."""
        return all(spec.activation is None for _, spec in self.layers.values())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(llama, tmp_path_factory.mktemp("lora") / "adapter")


def at_load_case(method: str, llama: Path, adapter: Path) -> Case:
    rules = load_rules(get_method(method), Options())
    return Case(llama, llama, adapter, quantize_as_at_load(llama, rules))


def checkpoint_case(scheme: SchemeSpec, llama: Path, adapter: Path, out: Path) -> Case:
    pair = quantized_checkpoint(llama, scheme, out)
    layers = {name: (weight, scheme) for name, weight in pair.layers.items()}
    return Case(pair.quantized, llama, adapter, layers)


def check(engines: EngineHost, flag: str, case: Case, **engine: Any) -> None:
    """One engine with and without the adapter: every layer, and all of them together."""
    asked, path = prompts(), str(case.adapter)
    base = load_reference(case.model, case.layers)
    expected = [merged_outputs(base, case.layers, ROWS), token_scores(base, asked)]
    adapted = with_adapter(base, case.adapter)
    expected += [merged_outputs(adapted, case.layers, ROWS), token_scores(adapted, asked)]
    multiply = {"op": "multiply", "layers": list(expected[0]), "rows": ROWS}
    score = {"op": "score", "prompts": asked}
    asks = [multiply, score, {**multiply, "adapter": path}, {**score, "adapter": path}, score]

    found = engines.run(case.folder, flag, asks, **LORA, **engine).answers

    compare = assert_same_scores if case.same_scores else assert_similar_scores
    for layers, scores in ((0, 1), (2, 3)):
        check_layers(found[layers], expected[layers])
        compare(found[scores], expected[scores])
    assert mean_difference(found[3], found[1]) >= ACTS
    assert found[4] == found[1]


@pytest.mark.parametrize("method", AT_LOAD)
def test_an_adapter_over_a_model_quantised_at_load(method, llama, adapter, engines: EngineHost):
    check(engines, method, at_load_case(method, llama, adapter))


@pytest.mark.parametrize("flag", CHECKPOINTS)
def test_an_adapter_over_a_quantised_checkpoint(flag, llama, adapter, tmp_path, engines):
    check(engines, flag, checkpoint_case(CHECKPOINTS[flag], llama, adapter, tmp_path / "pair"))


def test_an_adapter_over_a_quantised_head(llama, adapter, tmp_path, engines: EngineHost):
    """vLLM asks the head of a model with adapters for its weight, though no adapter is for it."""
    scheme = gptq(4, 64, symmetric=True)
    config = get_format("gptq").render({"lm_head": scheme}, ignore=())
    rules = LayerRules(default=scheme, lm_head=scheme)
    pair = ruled_checkpoint(llama, rules, config, tmp_path / "pair")
    asked = prompts()
    reference = load_reference(llama, {name: (w, scheme) for name, w in pair.layers.items()})
    score = {"op": "score", "prompts": asked, "adapter": str(adapter)}

    (found,) = engines.run(pair.quantized, "quantkit-gptq", [score], **LORA).answers

    assert_same_scores(found, token_scores(with_adapter(reference, adapter), asked))


def test_an_adapter_over_two_ranks(llama, adapter, tmp_path, engines: EngineHost):
    case = checkpoint_case(CHECKPOINTS["quantkit-gptq"], llama, adapter, tmp_path / "pair")
    asked = prompts()
    reference = with_adapter(load_reference(llama, case.layers), adapter)

    answers = engines.run(
        case.folder,
        "quantkit-gptq",
        [{"op": "score", "prompts": asked, "adapter": str(adapter)}],
        env=TWO_RANKS,
        tensor_parallel_size=2,
        **LORA,
    ).answers

    assert_same_scores(answers[0], token_scores(reference, asked))


def test_a_compiled_model_generates_with_and_without_an_adapter(
    llama, adapter, engines: EngineHost
):
    """In batches of one kind: on CPU vLLM gives an adapter to all of a batch that has one."""
    case = at_load_case("quantkit-int4", llama, adapter)
    asked = prompts(4, length=40)
    base = load_reference(llama, case.layers)
    expected = [greedy(base, prompt) for prompt in asked]
    with_adapter(base, adapter)
    adapted = [greedy(base, prompt) for prompt in asked]
    generate = {"op": "generate", "prompts": asked, "max_tokens": NEW_TOKENS}

    answers = engines.run(
        llama,
        "quantkit-int4",
        [generate, {**generate, "adapters": [str(adapter)] * len(asked)}, generate],
        **{**LORA, "max_num_seqs": 4, "enforce_eager": False},
    ).answers

    assert answers == [expected, adapted, expected]


def test_smoothing_and_adapters_are_refused_together(llama, tmp_path, engines: EngineHost):
    stats = tmp_path / "stats.safetensors"
    write_activation_stats({"model.layers.0.mlp.up_proj": torch.ones(256)}, stats, tokens=1)
    options = {"additional_config": {"quantkit": {"activation_stats": str(stats)}}}

    with pytest.raises(EngineFailed, match=r"start without --enable-lora, or without activation"):
        engines.run(llama, "quantkit-smoothquant", [], **LORA, **options)


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The `NEW_TOKENS` best tokens, each after those before it."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
