"""The outlier twin has outliers, and computes what its model does."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.outliers import outlier_twin
from tests.tiny_models import create_tiny_model
from vllm_quantkit.quantize.activation_stats import collect_activation_stats

DEMO = Path(__file__).parents[1] / "examples" / "tiny-lm" / "bf16"

STANDS_OUT = 20
"""Times the median channel: factors are 30 at least, and channels differ by themselves."""

ROUNDING = 1e-5
"""Of the largest logit: every product is rounded once more in float32."""


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(params=["demo", "llama", "qwen2"])
def model_folder(request, tmp_path) -> Path:
    """Trained, random, with biases; all with query heads in groups."""
    if request.param == "demo":
        return DEMO
    return create_tiny_model(request.param, tmp_path / "model")


def test_same_logits_with_outliers_before_every_linear_layer(model_folder, tmp_path):
    model, twin = load(model_folder), load(outlier_twin(model_folder, tmp_path / "twin"))
    tokens = torch.randint(4, 500, (2, 64), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        expected, found = model(tokens).logits, twin(tokens).logits

    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
    for name, largest in collect_activation_stats(twin, [tokens]).items():
        if name != "lm_head":
            assert largest.max() >= STANDS_OUT * largest.median(), name
    for name, largest in collect_activation_stats(model, [tokens]).items():
        assert largest.max() < STANDS_OUT * largest.median(), name
