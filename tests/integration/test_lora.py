"""LoRA adapters made by `peft` over every scheme: y = base(x) + scale B A x."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantkit_kernels.wna16 import QuantizedWeight
from tests.helpers import quantized_checkpoint
from tests.integration.engines import EngineFailed, EngineHost, EngineResult
from tests.integration.layers import ROWS, check_layers
from tests.integration.reference import (
    FLIPPED_TOLERANCE,
    Scores,
    assert_same_scores,
    assert_similar_scores,
    mean_difference,
    prompts,
    token_scores,
)
from tests.integration.schemes import awq, compressed, gptq
from tests.integration.test_at_load import AT_LOAD
from tests.lora_adapters import random_adapter, with_adapter
from tests.reference_model import load_reference, merged_outputs, quantize_as_at_load
from tests.tiny_models import create_tiny_model
from vllm_quantkit.options import Options
from vllm_quantkit.schemes import get_method
from vllm_quantkit.schemes.at_load import load_rules
from vllm_quantkit.spec import SchemeSpec

pytestmark = pytest.mark.engine

LORA = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}

CHECKPOINTS = {
    "quantkit-awq": awq(64),
    "quantkit-gptq": gptq(4, 64, symmetric=True, act_order=True),
    "quantkit": compressed(8, -1, symmetric=True),
}
"""Flag to a checkpoint it serves, beside the methods that quantise at load."""

ACTS = 5 * FLIPPED_TOLERANCE
"""What an adapter changes at least, mean |difference| of log-probabilities; ours changes 1 to 2."""


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
