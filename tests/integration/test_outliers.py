"""The demo model with the outlier channels of large models: what they break, and what serves them.

`-s` prints the perplexities.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit_kernels.act_quant import PER_TENSOR
from tests.helpers import block_linears, output_major
from tests.integration.engines import ENVIRONMENT, ROOT, EngineHost
from tests.integration.reference import perplexity
from tests.outliers import outlier_twin
from vllm_quantkit.formats import Role, get_format
from vllm_quantkit.quantize.activation_stats import read_activation_stats
from vllm_quantkit.quantize.checkpoint import exchange_layers, write_checkpoint
from vllm_quantkit.quantize.rtn import rtn
from vllm_quantkit.spec import PER_CHANNEL, ActivationSpec, SchemeSpec, WeightSpec

pytestmark = pytest.mark.engine

DEMO = ROOT / "examples" / "tiny-lm"
WINDOW, WINDOWS = 250, 24  # 5,976 scored tokens
SAMPLES, SAMPLE_TOKENS = 256, 256

CLOSE = 0.01
"""What the project promises: at most 1.0 % above the perplexity of the same model in 16 bits."""

BROKEN = 0.1
"""What no one would serve; `plain` W8A8 of the model without its outliers costs 0.1 %."""

INT8 = WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True)
STATIC = SchemeSpec(
    dialect="compressed-tensors",
    variant="int-quantized",
    weight=INT8,
    activation=ActivationSpec(code="int8", dynamic=False, group_size=PER_TENSOR),
)
"""Naive W8A8: one scale for all activations of a layer, fixed beforehand."""


@dataclass
class Twin:
    """The outlier twin and what was measured of it.

    Attributes:
        folder: of the model.
        stats: its activation statistics.
        windows: tokens of held-out text.
        engines: bfloat16, what runs it.
        measured: what ran to its perplexity.
    """

    folder: Path
    stats: Path
    windows: list[list[int]]
    engines: EngineHost
    measured: dict[str, float]

    def excess(self, what: str, method: str | None, *, smooth: bool = False, **options: Any) -> str:
        """Measures; returns how much worse than 16 bits, as `+1.23 %`."""
        raise NotImplementedError
