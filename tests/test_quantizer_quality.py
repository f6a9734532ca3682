"""The benchmark's yardstick reads what a checkpoint stores, and measures it right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.quantizer_quality import Reference, make_reference, predict, text_windows
from quantkit_kernels.act_quant import RowQuantizer
from tests.tiny_models import LICENSE, create_tiny_model
from tests.written_models import write_model
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.evaluate.hf_model import ServedLinear, load_plain, load_served
from vllm_quantkit.spec import PER_CHANNEL, ActivationSpec, SchemeSpec, WeightSpec

FLOAT8 = WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True, code_type="e4m3")
INT8 = WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True)
SCHEMES = {
    "gptq": SchemeSpec(
        dialect="gptq", weight=WeightSpec(bits=3, group_size=64, symmetric=True), variant="gptq"
    ),
    "awq": SchemeSpec(
        dialect="awq", weight=WeightSpec(bits=4, group_size=64, symmetric=False), variant="gemm"
    ),
    "int8": SchemeSpec(
        dialect="compressed-tensors",
        weight=INT8,
        variant="int-quantized",
        activation=ActivationSpec(code="int8"),
    ),
    "fp8": SchemeSpec(
        dialect="compressed-tensors",
        weight=FLOAT8,
        variant="float-quantized",
        activation=ActivationSpec(code="e4m3"),
    ),
}
STATIC = ActivationSpec(code="int8", dynamic=False, group_size=0)

EXACT = 1e-6
"""Relative: float32 sums of a few hundred losses, added in another order."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model("llama", tmp_path_factory.mktemp("quality") / "model")


@pytest.fixture(scope="module")
def reference(llama: Path) -> Reference:
    return make_reference(load_plain(llama), text_windows(llama, LICENSE.read_text(), 64)[:4])


def test_windows_hold_the_text_in_order(llama: Path) -> None:
    text = LICENSE.read_text()
    windows = text_windows(llama, text, 64)
    whole = text_windows(llama, text, windows[:, 1:].numel() + 1)[0]
    assert windows[:, 0].unique().tolist() == [whole[0]]
    assert torch.equal(windows[:, 1:].flatten(), whole[1:])


def test_perplexity_is_that_of_the_plain_model(llama: Path, reference: Reference) -> None:
    plain = load_plain(llama)
    with torch.no_grad():
        losses = [plain(row[None], labels=row[None]).loss for row in reference.windows]
    expected = math.exp(float(torch.stack(losses).double().mean()))
    assert reference.perplexity == pytest.approx(expected, rel=EXACT)


def test_identical_models_do_not_differ(llama: Path, reference: Reference) -> None:
    quality = reference.compare(load_plain(llama))
    assert quality.divergence == 0.0
    assert quality.increase == 0.0
    assert quality.perplexity == reference.perplexity


def test_divergence_is_the_definition(reference: Reference) -> None:
    p = reference.log_probs.double().exp()
    uniform = torch.full_like(reference.log_probs, -math.log(p.shape[-1]))
    entropy = -(p * p.log()).sum(-1).mean()
    found = Reference(reference.windows, reference.log_probs).divergence(uniform)
    assert found == pytest.approx(math.log(p.shape[-1]) - float(entropy), rel=EXACT)


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_what_is_stored(name: str, llama: Path, tmp_path: Path) -> None:
    written = write_model(llama, tmp_path / name, lambda _: SCHEMES[name])
    model = load_served(written.folder)
    for layer, weight in written.weights.items():
        served = model.get_submodule(layer)
        assert isinstance(served, ServedLinear)
        assert torch.equal(served.weight, weight.dequantize().float())
    assert bool(predict(model, torch.tensor([[0, 5, 6]])).isfinite().all())


def test_activations_are_rounded_by_token() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    served = ServedLinear(torch.eye(8), None, RowQuantizer("int8"))
    assert torch.allclose(served(x), _rounded(x), rtol=0, atol=EXACT)
    assert not torch.equal(served(x), x)


def _rounded(x: Tensor) -> Tensor:
    """int8 with one scale per token, from the definition in float64."""
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    return (torch.round(x.double() / scale) * scale).float()


def test_static_activations_are_refused(llama: Path, tmp_path: Path) -> None:
    static = SCHEMES["int8"].model_copy(update={"activation": STATIC})
    written = write_model(llama, tmp_path / "static", lambda _: static)
    with pytest.raises(UnsupportedScheme, match="only plain dynamic ones are compared"):
        load_served(written.folder)
