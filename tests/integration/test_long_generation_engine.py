"""Long generation through the real engine, on the demo model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.integration.engines import ENVIRONMENT
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.long_generation.explain import explain
from vllm_quantkit.long_generation.measure import measure_against, record_base
from vllm_quantkit.long_generation.plan import LongPlan
from vllm_quantkit.long_generation.prompts import prompts_of_windows

pytestmark = pytest.mark.engine

DEMO = Path(__file__).parents[2] / "examples" / "tiny-lm"
TOKENS = 96
OPTIONS = (("dtype", "float32"), ("enforce_eager", True))


def test_a_quantised_model_parts_from_its_base(tmp_path, monkeypatch):
    """Two engines, which write and read; the base beside itself is the control."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    plan = LongPlan(prompts=3, prompt_tokens=32, tokens=TOKENS)
    base = record_base(
        EngineSpec(str(DEMO / "bf16"), options=OPTIONS), prompts(plan), plan, max_length=1024
    )

    found = measure_against(base, EngineSpec(str(DEMO / "awq"), "quantkit-awq", options=OPTIONS))

    assert [decoding.name for decoding in found.decodings] == ["greedy", "sampled"]
    for decoding in found.decodings:
        assert decoding.base.lengths == decoding.model.lengths == (TOKENS,) * 3
        assert decoding.curve[0].first == 1
        assert decoding.curve[-1].last == TOKENS
        # On held-out text the checkpoint's KL is 0.013 nats; on text of the model's own it is of
        # that order, and a position too early or too late would give nats.
        assert all(0.001 < part.divergence.value < 0.2 for part in decoding.curve)
    greedy = found.decodings[0]
    assert greedy.noise is not None
    # In float32, sums taken in another order move no choice between words.
    assert greedy.noise.never.value == 1
    assert any(position is not None for position in greedy.divergence.positions)
    # Greedy text is the likeliest at each position.
    assert greedy.parting_probability is not None
    assert greedy.parting_probability > 1 / 2048
    assert len(explain(found)) >= 6


def prompts(plan: LongPlan):
    """Windows of the demo's held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "bf16")
    text = (DEMO / "data" / "held_out.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    rows = tuple((0, *ids[start : start + 63]) for start in range(0, 12_000, 4000))
    return prompts_of_windows(Windows(rows, "held_out.txt"), plan)
