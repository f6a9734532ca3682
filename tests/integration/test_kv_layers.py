"""Which layers get an INT4 cache: their own, another's, or none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

from quantkit_kernels.kv_int4 import KeyTreatment
from tests.integration.kv_files import calibration_folder, random_treatments
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.integration import compat, kv_treatment
from vllm_quantkit.integration.kv_backend import SHIFT, Int4Impl
from vllm_quantkit.integration.kv_cache import KVCache
from vllm_quantkit.integration.kv_fp8 import FP8Scales
from vllm_quantkit.integration.names import LayerNames
from vllm_quantkit.integration.report import LoadReport
from vllm_quantkit.options import KVCacheOptions

PREFIX = "model.layers.{}.self_attn.attn"


def attention(window: int | None = None, target: str | None = None) -> Any:
    """An attention layer as it is when it asks for its method."""
    layer = Attention.__new__(Attention)
    nn.Module.__init__(layer)
    fields = {
        "attn_type": "decoder",
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 64,
        "head_size_v": 64,
        "sliding_window": window,
        "use_mm_prefix": False,
        "kv_sharing_target_layer_name": target,
        "impl": SimpleNamespace(alibi_slopes=None, scale=0.125, logits_soft_cap=0, sinks=None),
    }
    for name, value in fields.items():
        setattr(layer, name, value)
    return layer


@pytest.fixture
def engine(monkeypatch) -> SimpleNamespace:
    """The config of an engine, on one rank."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(
            cache_dtype="int4_per_token_head", kv_cache_dtype_skip_layers=["3", "sliding_window"]
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        model_config=SimpleNamespace(is_hybrid=False),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=True),
        compilation_config=SimpleNamespace(static_forward_context={}),
        kv_transfer_config=None,
    )
    monkeypatch.setattr(compat, "current_config", lambda: config)
    monkeypatch.setattr(kv_treatment, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(kv_treatment, "get_tensor_model_parallel_world_size", lambda: 1)
    return config


def cache(**options: Any) -> KVCache:
    names = LayerNames()
    report = LoadReport("quantkit-awq", names, num_layers=4)
    return KVCache(KVCacheOptions(**options), report, int4=False)


def test_layers_are_skipped_in_our_words_and_in_vllms(engine):
    made, layers = cache(skip_layers=(1,)), [attention() for _ in range(4)]
    layers.append(attention(window=16))

    for index, layer in enumerate(layers):
        assert made.method(layer, PREFIX.format(index)) is None
        assert made.method(layer, PREFIX.format(index)) is None  # asked again after loading

    ours = [isinstance(layer.impl, Int4Impl) for layer in layers]
    assert ours == [True, False, True, False, False]
    assert engine.cache_config.cache_dtype == "auto"
    assert layers[0].kv_cache_torch_dtype == torch.uint8
    assert layers[0].impl.attention.softmax.scale == 0.125


def test_a_layer_that_shares_a_cache_reads_it_as_its_owner_wrote_it(engine, tmp_path):
    treatments = random_treatments(layers=4, heads=2, head_size=64)
    folder = calibration_folder(tmp_path / "kv", treatments, kept=(2,))
    made, owners = cache(calibration=folder), [attention() for _ in range(3)]
    for index, owner in enumerate(owners):
        engine.compilation_config.static_forward_context[PREFIX.format(index)] = owner
        made.method(owner, PREFIX.format(index))
    of_int4, of_kept = (attention(target=PREFIX.format(index)) for index in (1, 2))

    made.method(of_int4, PREFIX.format(4))
    made.method(of_kept, PREFIX.format(5))

    assert of_int4.impl.attention.cached
    assert not owners[1].impl.attention.cached
    assert torch.equal(getattr(of_int4, SHIFT), treatments[1].shift)
    assert not isinstance(of_kept.impl, Int4Impl)


@pytest.mark.parametrize(
    ("treatments", "words"),
    [
        (random_treatments(layers=1, heads=4, head_size=64), "calibration has 4 heads of 64"),
        (random_treatments(layers=1, heads=2, head_size=32), "calibration has 2 heads of 32"),
    ],
)
def test_a_calibration_of_another_model_is_refused(treatments, words, engine, tmp_path):
    made = cache(calibration=calibration_folder(tmp_path / "kv", treatments))
    with pytest.raises(CheckpointError, match=words):
        made.method(attention(), PREFIX.format(0))
    with pytest.raises(CheckpointError, match=r"has no layer model\.layers\.1\.self_attn"):
        made.method(attention(), PREFIX.format(1))
    assert made.method(attention(), PREFIX.format(4)) is None  # behind the last layer


@pytest.mark.parametrize(("rank", "heads"), [(0, [0]), (1, [0]), (2, [1]), (3, [1])])
def test_four_ranks_share_two_heads(rank, heads, engine, monkeypatch):
    monkeypatch.setattr(kv_treatment, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(kv_treatment, "get_tensor_model_parallel_world_size", lambda: 4)
    shift = torch.arange(2.0)[:, None].expand(2, 64)
    found = SimpleNamespace(shift=shift, scale=None)

    cut = kv_treatment.KVStatistics(LayerNames(), None).treatment(
        PREFIX.format(0), found, kv_treatment.ServedHeads(1, 64)
    )

    assert isinstance(cut, KeyTreatment)
    assert torch.equal(cut.shift, shift[heads])


def test_fp8_scales_are_set_wherever_backends_look():
    layer = SimpleNamespace(_k_scale=torch.tensor(1.0), _v_scale=torch.tensor(1.0))

    FP8Scales(0.5, 0.25).process_weights_after_loading(layer)

    assert (layer._k_scale.item(), layer._v_scale.item()) == (0.5, 0.25)
    assert (layer._k_scale_float, layer._v_scale_float) == (0.5, 0.25)
    assert (layer._k_scale_cpu.item(), layer._v_scale_cpu.item()) == (0.5, 0.25)
