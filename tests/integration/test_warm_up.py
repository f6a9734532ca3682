"""What is launched before an engine serves is all that it ever launches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit_kernels.tile_choice import forget_tables
from quantkit_kernels.triton_common import INTERPRETED
from quantkit_kernels.tuning import batch_invariant, bucket_starts, set_batch_invariant
from quantkit_kernels.tuning_tables import FOLDER, TableError, file_name
from tests.kernels.launch_keys import LaunchKeys, launch_keys
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats import Role
from vllm_quantkit.integration import compat, warm_up
from vllm_quantkit.integration import context as load_context
from vllm_quantkit.integration.blocks import Feed
from vllm_quantkit.integration.context import LoadContext
from vllm_quantkit.integration.fusion import fuse, fused
from vllm_quantkit.integration.linear import QuantkitLinearMethod, Segment
from vllm_quantkit.integration.names import LayerNames
from vllm_quantkit.integration.report import LoadReport
from vllm_quantkit.integration.warm_up import Kind, WarmUp
from vllm_quantkit.options import LayerOptions, Options
from vllm_quantkit.schemes import get_method
from vllm_quantkit.schemes.linear import linear_scheme

__all__ = ["launch_keys"]

N, K = 384, 256
MOST = 8192
EVERY = (*range(1, 66), *range(67, MOST, 131), MOST)
"""Numbers of tokens: all small ones, of the others some in every bucket, of any remainder by 16."""

INT4 = get_method("quantkit-int4").at_load(LayerOptions())
METHODS = ("quantkit-int4", "quantkit-int8", "quantkit-smoothquant", "quantkit-fp8-block")


@pytest.fixture(autouse=True)
def _compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU."""
    monkeypatch.setattr(warm_up, "compiles_at_launch", lambda device: True)


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(K, dtype=torch.bfloat16))
        self.variance_epsilon = 1e-6


class SiluAndMul(nn.Module):
    pass


def method_of(scheme: Any, segment: Segment) -> QuantkitLinearMethod:
    """A linear method whose layer is packed."""
    method = QuantkitLinearMethod(scheme, "layer", ("layer",), SimpleNamespace())
    method._segments = (segment,)
    method._dtype = torch.bfloat16
    method._share = SimpleNamespace(in_features=K)
    return method


def layer_of(name: str, *, bias: bool = False, outliers: bool = False) -> Any:
    """A packed layer of a method that quantises at load."""
    scheme = linear_scheme(get_method(name).at_load(LayerOptions()))
    weight = scheme.quantize(torch.randn(N, K))
    parts = {
        Role.CODES: weight.codes,
        Role.SCALES: weight.scales,
        Role.ZEROS: weight.zeros,
        Role.GROUP_INDEX: weight.group_index,
    }
    if outliers:
        parts[Role.INPUT_ABSMAX] = torch.arange(K) % 9.0
    packed = scheme.pack(parts, torch.bfloat16)
    layer: Any = nn.Module()
    for tensor in packed.tensors:
        layer.register_parameter(tensor, nn.Parameter(packed.tensors[tensor], False))
    layer.bias = nn.Parameter(torch.zeros(N, dtype=torch.bfloat16), False) if bias else None
    layer.quant_method = method_of(scheme, Segment(packed.kernel, tuple(packed.tensors), ""))
    return layer


def warmed(layers: list[Any], feeds: list[Feed], most: int = MOST) -> WarmUp:
    found = WarmUp(torch.device("cpu"))
    for layer in layers:
        found.add(layer, layer.quant_method._kind(layer))
    found.run("quantkit", feeds, most)
    return found


def feed_of(source: nn.Module, layer: Any) -> Feed:
    """A norm or activation that quantises for a layer."""
    feed = Feed(source, layer)
    norms = isinstance(source, RMSNorm)
    layers: Any = SimpleNamespace(
        norm_feeds=lambda: [feed] if norms else [], activation_feeds=lambda: [feed] * (not norms)
    )
    assert fuse(layers) == 1
    assert list(fused(layers)) == [feed]
    return feed


def launched_later(keys: LaunchKeys, call: Callable[[int], object]) -> set[Any]:
    """Kernels that serving launches, and loading did not."""
    before = set(keys.seen)
    assert before
    for m in EVERY:
        call(m)
    return keys.seen - before


def rows(m: int, width: int = K) -> Tensor:
    return torch.empty(m, width, dtype=torch.bfloat16)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_kernel_of_a_layer_is_compiled(name: str, bias: bool, launch_keys: LaunchKeys):
    layer = layer_of(name, bias=bias)
    warmed([layer], [])
    apply = layer.quant_method.apply
    assert launched_later(launch_keys, lambda m: apply(layer, rows(m), layer.bias)) == set()
    assert launched_later(launch_keys, lambda m: apply(layer, rows(m), None)) == set()


@pytest.mark.parametrize("fixed", [False, True])
def test_every_kernel_for_outliers_is_compiled(fixed: bool, launch_keys: LaunchKeys):
    layer = layer_of("quantkit-llm-int8", outliers=fixed)
    warmed([layer], [])
    serve = layer.quant_method.apply
    assert launched_later(launch_keys, lambda m: serve(layer, rows(m), None)) == set()


def test_every_kernel_of_a_norm_that_quantises_is_compiled(launch_keys: LaunchKeys):
    layer, norm = layer_of("quantkit-smoothquant"), RMSNorm()
    warmed([layer], [feed_of(norm, layer)])

    def serve(m: int) -> None:
        layer.quant_method.apply(layer, norm._forward_method(rows(m)), None)
        layer.quant_method.apply(layer, norm._forward_method(rows(m), rows(m))[0], None)

    assert launched_later(launch_keys, serve) == set()


def test_every_kernel_of_an_activation_that_quantises_is_compiled(launch_keys: LaunchKeys):
    layer, silu = layer_of("quantkit-smoothquant"), SiluAndMul()
    warmed([layer], [feed_of(silu, layer)])

    def serve(m: int) -> None:
        layer.quant_method.apply(layer, silu._forward_method(rows(m, 2 * K)), None)

    assert launched_later(launch_keys, serve) == set()


def test_fewer_tokens_than_are_served_are_not_enough(launch_keys: LaunchKeys):
    layer = layer_of("quantkit-int4")
    warmed([layer], [], most=16)
    assert launched_later(launch_keys, lambda m: layer.quant_method.apply(layer, rows(m))) != set()


class Counted:
    """A layer that notes what it is given."""

    def __init__(self, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.quant_method = self
        self.given: list[tuple[int, bool]] = []

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> None:
        assert x.shape[1] == K
        assert x.dtype == torch.float16
        assert torch.is_inference_mode_enabled()
        self.given.append((len(x), bias is not None))


def kind_of(name: str) -> Kind:
    kernel: Any = name
    return Kind((kernel,), (), K, torch.float16)


def test_one_layer_of_a_kind_is_run_once_in_every_bucket():
    warm, layers = WarmUp(torch.device("cpu")), [Counted() for _ in range(3)]
    for layer, kind in zip(layers, ("gate", "gate", "down"), strict=True):
        warm.add(layer, kind_of(kind))
    warm.run("quantkit-int4", [], 700)
    once = [(m, False) for m in bucket_starts(700)]
    assert [layer.given for layer in layers] == [once, [], once]

    reloaded = Counted()
    warm.add(reloaded, kind_of("gate"))
    warm.run("quantkit-int4", [], 700)
    assert reloaded.given == []


def test_a_bias_is_added_and_left_out():
    warm, layer = WarmUp(torch.device("cpu")), Counted(torch.zeros(1))
    warm.add(layer, kind_of("qkv"))
    warm.run("quantkit-int4", [], 1)
    assert layer.given == [(1, False), (1, True)]


def test_nothing_is_run_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    warm, layer = WarmUp(torch.device("cpu")), Counted()
    warm.add(layer, kind_of("qkv"))
    warm.run("quantkit-int4", [], MOST)
    assert layer.given == []


def test_a_damaged_table_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / file_name(INTERPRETED.name)).write_text("{")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    forget_tables()
    with pytest.raises(TableError, match=r"triton-interpreter\.json is not JSON"):
        WarmUp(torch.device("cpu"))
    forget_tables()


@pytest.mark.parametrize(("multimodal", "most"), [(False, 2048), (True, sys.maxsize)])
def test_how_many_tokens_a_layer_may_be_given(multimodal, most, monkeypatch):
    config = SimpleNamespace(
        model_config=SimpleNamespace(is_multimodal_model=multimodal),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
    )
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: config)
    assert compat.most_tokens() == most


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoadContext]:
    """Of a model with two layers, for an engine that serves at most three tokens at once."""
    monkeypatch.setattr(compat, "wants_batch_invariance", lambda: True)
    monkeypatch.setattr(compat, "serves_lora", lambda: False)
    monkeypatch.setattr(compat, "most_tokens", lambda: 3)
    monkeypatch.setattr(compat, "is_pipeline_parallel", lambda: True)
    monkeypatch.setattr(load_context, "KVCache", lambda *given, **options: None)
    report = LoadReport("quantkit-int4", LayerNames())
    report.expect("first")
    report.expect("last")
    yield LoadContext(get_method("quantkit-int4"), Options(), LayerNames(), report)
    set_batch_invariant(False)


def test_the_last_layer_lets_all_run(context: LoadContext):
    layers = [Counted(), Counted()]
    context.warm_up.add(layers[0], kind_of("gate"))
    context.ready("first", "a kernel")
    assert layers[0].given == []
    context.warm_up.add(layers[1], kind_of("down"))
    context.ready("last", "a kernel")
    assert [layer.given for layer in layers] == [[(m, False) for m in (1, 2, 3)]] * 2


def test_the_users_wish_for_invariant_batches_is_heard(context: LoadContext):
    assert batch_invariant()
    with pytest.raises(UnsupportedScheme, match="cpu multiplies one token in another order"):
        context.check_invariant("first", (), INT4, torch.bfloat16)
    set_batch_invariant(False)
    context.check_invariant("first", (), INT4, torch.bfloat16)
