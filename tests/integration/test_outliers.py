"""The demo model with the outlier channels of large models: what they break, and what serves them.

`-s` prints the perplexities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit_kernels.act_quant import PER_TENSOR
from tests.helpers import block_linears, output_major
from tests.integration.engines import ROOT, EngineHost
from tests.integration.reference import perplexity
from tests.outliers import outlier_twin
from vllm_quantkit.formats import Role, get_format
from vllm_quantkit.quantize.activation_stats import (
    collect_activation_stats,
    read_activation_stats,
    write_activation_stats,
)
from vllm_quantkit.quantize.calibration import CalibrationOptions, load_token_sets
from vllm_quantkit.quantize.methods.rtn import rtn
from vllm_quantkit.quantize.output.checkpoint import exchange_layers, write_checkpoint
from vllm_quantkit.spec import PER_CHANNEL, ActivationSpec, SchemeSpec, WeightSpec

pytestmark = pytest.mark.engine

DEMO = ROOT / "examples" / "tiny-lm"
WINDOW, WINDOWS = 250, 24  # 5,976 scored tokens
SAMPLE_TOKENS = 256

CLOSE = 0.01
"""What the project promises: at most 1.0 % above the perplexity of the same model in 16 bits."""

BROKEN = 0.1
"""What no one would serve: ten times as much."""

STATIC = SchemeSpec(
    dialect="compressed-tensors",
    variant="int-quantized",
    weight=WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True),
    activation=ActivationSpec(code="int8", dynamic=False, group_size=PER_TENSOR),
)
"""Naive W8A8: one scale for all activations of a layer, fixed beforehand."""


@dataclass
class Measurements:
    """Held-out perplexities in bfloat16 engines.

    Attributes:
        engines: run the models.
        windows: tokens of held-out text.
        base: the model whose 16-bit perplexity counts.
        seen: what was measured.
    """

    engines: EngineHost
    windows: list[list[int]]
    base: Path
    seen: dict[str, float] = field(default_factory=dict)

    @cached_property
    def in_16_bits(self) -> float:
        """Perplexity."""
        return self._measure("16 bits", self.base, None, {})

    def excess(self, what: str, folder: Path, method: str, **quantkit: Any) -> float:
        """Perplexity / perplexity in 16 bits - 1."""
        return self._measure(what, folder, method, quantkit) / self.in_16_bits - 1

    def table(self) -> str:
        """What was measured, a line each."""
        rows = [
            f"{value:8.3f}  {value / self.in_16_bits - 1:+7.2%}  " for value in self.seen.values()
        ]
        return "\n".join(row + what for row, what in zip(rows, self.seen, strict=True))

    def _measure(
        self, what: str, folder: Path, method: str | None, quantkit: dict[str, Any]
    ) -> float:
        config = {"additional_config": {"quantkit": quantkit}} if quantkit else {}
        asks = [{"op": "score", "prompts": self.windows}]
        result = self.engines.run(folder, method, asks, dtype="bfloat16", **config)
        self.seen[what] = perplexity(result.answers[0])
        return self.seen[what]


@pytest.fixture(scope="module")
def twin(tmp_path_factory) -> Path:
    """The demo model with outliers, in float32."""
    return outlier_twin(DEMO / "bf16", tmp_path_factory.mktemp("outliers") / "twin")


@pytest.fixture(scope="module")
def stats(twin) -> str:
    """The twin's activation statistics over the demo model's calibration text."""
    out, text = twin.with_name("stats.safetensors"), str(DEMO / "data" / "calibration.txt")
    options = CalibrationOptions(source=text, length=SAMPLE_TOKENS, held_out=1)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "bf16")
    calibration = load_token_sets(options, tokenizer, SAMPLE_TOKENS).calibration
    model = AutoModelForCausalLM.from_pretrained(twin, dtype="auto").eval()
    largest = collect_activation_stats(model, (ids for ids, _, _ in calibration.batches(4)))
    # Seven linear layers in each of four blocks, and the head.
    assert len(largest) == 29
    write_activation_stats(largest, out, tokens=calibration.tokens)
    return str(out)


@pytest.fixture(scope="module")
def measurements(twin, engines: EngineHost) -> Iterator[Measurements]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "bf16")
    text = (DEMO / "data" / "held_out.txt").read_text()
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, WINDOWS * WINDOW, WINDOW)
    measured = Measurements(engines, [tokens[start : start + WINDOW] for start in starts], twin)
    yield measured
    print(f"\n{measured.table()}")


def naive_static(twin: Path, stats: str, out: Path) -> Path:
    """A checkpoint whose activations have one scale in each layer, from the statistics."""
    largest = read_activation_stats(Path(stats))
    model = AutoModelForCausalLM.from_pretrained(twin)
    layers = {
        name: rtn(output_major(linear), STATIC.weight, scale_dtype=torch.float32)
        for name, linear in block_linears(model).items()
    }
    scales = {name: {Role.INPUT_SCALE: largest[name].max().view(1) / 127} for name in layers}
    config = get_format(STATIC.dialect).render(dict.fromkeys(layers, STATIC), ("lm_head",))
    exchange = exchange_layers(layers, STATIC, scales)
    write_checkpoint(twin, out, exchange, {"quantization_config": config})
    return out


def test_the_twin_in_16_bits_is_the_model_in_16_bits(measurements):
    excess = measurements.excess("16 bits, without the outliers", DEMO / "bf16", None)

    assert abs(excess) <= 1e-3  # bfloat16 rounds other numbers


def test_naive_static_w8a8_is_broken(twin, stats, tmp_path, measurements):
    folder = naive_static(twin, stats, tmp_path / "static")

    excess = measurements.excess("W8A8, static per tensor", folder, "quantkit-smoothquant")

    assert excess > BROKEN, f"only {excess:+.2%}"


def test_w8a8_without_statistics_suffers(twin, measurements):
    excess = measurements.excess("W8A8, dynamic per token", twin, "quantkit-smoothquant")

    assert excess > CLOSE, f"{excess:+.2%}: these outliers need no smoothing"


def test_smoothquant_with_statistics_is_close(twin, stats, measurements):
    excess = measurements.excess(
        "W8A8, smoothed", twin, "quantkit-smoothquant", activation_stats=stats
    )

    assert excess <= CLOSE, f"{excess:+.2%}"


def test_llm_int8_that_finds_outliers_in_every_batch_is_close(twin, measurements):
    excess = measurements.excess("LLM.int8()", twin, "quantkit-llm-int8")

    assert excess <= CLOSE, f"{excess:+.2%}"


def test_llm_int8_with_outliers_from_statistics_is_close(twin, stats, measurements):
    excess = measurements.excess(
        "LLM.int8(), fixed channels", twin, "quantkit-llm-int8", activation_stats=stats
    )

    assert excess <= CLOSE, f"{excess:+.2%}"


def test_fp8_per_token_and_channel_is_close(twin, measurements):
    excess = measurements.excess("FP8 per token and channel", twin, "quantkit-fp8")

    assert excess <= CLOSE, f"{excess:+.2%}"
