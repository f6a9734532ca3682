"""`quantkit bench` with real engines, on the demo model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.integration.engines import ENVIRONMENT, ROOT, EngineFailed

pytestmark = pytest.mark.engine

DEMO = ROOT / "examples" / "tiny-lm" / "bf16"
PLAN = ("--batches", "1,2", "--tokens", "4", "--prompts", "64", "--load", "1", "--mixed", "2")
QUANTITIES = {"decode", "gap", "gap_tail", "prefill", "first", "first_loaded", "mixed"}


def test_two_schemes_side_by_side():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm_quantkit.cli", "bench", str(DEMO), *PLAN),
            *("--schemes", "16-bit,quantkit-int8", "--rounds", "2", "--enforce-eager", "--json"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
    )

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    plain, int8 = result["rows"]
    assert result["base"] == "16-bit"
    assert not result["conclusive"]  # two rounds are too few
    for row in (plain, int8):
        assert row["failure"] == ""
        assert {entry["quantity"] for entry in row["entries"]} == QUANTITIES
        assert all(entry["sample"]["low"] > 0 for entry in row["entries"])
        assert all(len(entry["sample"]["rounds"]) == 2 for entry in row["entries"])
    # 8 bits hardly change what the model says, and halve what their layers take.
    assert int8["perplexity"] == pytest.approx(plain["perplexity"], rel=0.02)
    assert int8["weight_bytes"] < 0.8 * plain["weight_bytes"]
    assert int8["cache_tokens"] == plain["cache_tokens"]
    assert len(result["noise"]["seconds"]) == 2 * 5


def test_sequences_that_do_not_run_together_are_no_batch(engines):
    asks = [
        {"op": "decode", "batch": 2, "tokens": 4},
        {"op": "first_token_under_load", "tokens": 64, "load": 1},
        {"op": "decode", "batch": 3, "tokens": 4},
    ]
    with pytest.raises(EngineFailed, match="3 sequences do not run at the same time"):
        engines.run(DEMO, None, asks, max_num_seqs=2)


def test_a_prompt_that_has_to_wait_is_no_load(engines):
    asks = [{"op": "first_token_under_load", "tokens": 64, "load": 2}]
    with pytest.raises(EngineFailed, match="beside 2 sequences waits until one ends"):
        engines.run(DEMO, None, asks, max_num_seqs=2, max_model_len=128)
