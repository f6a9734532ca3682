"""Layers whose results depend on the batch are refused where the user asks that none do."""

from __future__ import annotations

import pytest
import torch

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.integration import compat
from vllm_quantkit.options import LayerOptions
from vllm_quantkit.schemes import get_method
from vllm_quantkit.schemes.invariance import check_invariant
from vllm_quantkit.spec import ActivationSpec, SchemeSpec

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def spec_of(method: str) -> SchemeSpec:
    spec = get_method(method).at_load(LayerOptions())
    assert spec is not None
    return spec


def per_tensor(*, dynamic: bool) -> SchemeSpec:
    """FP8 with one scale for all activations."""
    activation = ActivationSpec(code="e4m3", dynamic=dynamic, group_size=0)
    return spec_of("quantkit-fp8").model_copy(update={"activation": activation})


def check(
    spec: SchemeSpec,
    device: torch.device = GPU,
    dtype: torch.dtype = torch.bfloat16,
    *,
    fixed: bool = False,
) -> None:
    check_invariant("model.layers.0.mlp", spec, device, dtype, fixed_outliers=fixed)


@pytest.mark.parametrize(
    "spec",
    [
        spec_of("quantkit-int4"),
        spec_of("quantkit-int8"),
        spec_of("quantkit-fp8"),
        spec_of("quantkit-fp8-block"),
        spec_of("quantkit-smoothquant"),
        per_tensor(dynamic=False),
    ],
    ids=SchemeSpec.describe,
)
def test_what_looks_at_one_token_at_a_time_is_served(spec: SchemeSpec):
    check(spec)
    with pytest.raises(UnsupportedScheme, match=r"cpu multiplies .* model\.layers\.0\.mlp"):
        check(spec, CPU)
    with pytest.raises(UnsupportedScheme, match=r"or use --dtype bfloat16\."):
        check(spec, dtype=torch.float32)


def test_one_scale_for_all_tokens_is_refused():
    with pytest.raises(UnsupportedScheme, match="one scale is made for all tokens"):
        check(per_tensor(dynamic=True))


def test_outliers_found_in_the_batch_are_refused():
    with pytest.raises(UnsupportedScheme, match="or use activation_stats, which fix them"):
        check(spec_of("quantkit-llm-int8"))
    check(spec_of("quantkit-llm-int8"), fixed=True)


@pytest.mark.parametrize(("value", "wanted"), [("0", False), ("1", True)])
def test_the_users_word_is_vllms_variable(value, wanted, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    assert compat.wants_batch_invariance() is wanted
