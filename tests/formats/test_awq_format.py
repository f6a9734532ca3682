"""AWQ: words built nibble by nibble, as AutoAWQ's `from_linear` does, and the config's meaning."""

import pytest
import torch

from vllm_quantkit.formats import awq
from vllm_quantkit.spec import LayerShape, SchemeSpec, WeightSpec

CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def spec(**weight):
    return SchemeSpec(
        dialect="awq",
        weight=WeightSpec(**{"bits": 4, "group_size": 128, "symmetric": False, **weight}),
        variant="gemm",
    )


def stored_by_name(fmt_spec, shape):
    return {tensor.name: tensor for tensor in awq.tensors(fmt_spec, shape)}


def word(nibbles):
    """Eight nibbles, lowest first, as a signed 32-bit integer."""
    value = sum(int(nibble) << (4 * i) for i, nibble in enumerate(nibbles))
    return value - (1 << 32) if value >= 1 << 31 else value


def test_gemm_interleaves_outputs():
    N, K = 16, 5
    codes = torch.randint(16, (N, K), dtype=torch.uint8)
    expected = torch.tensor(
        [
            [word(codes[8 * w + n, k] for n in (0, 2, 4, 6, 1, 3, 5, 7)) for w in range(N // 8)]
            for k in range(K)
        ],
        dtype=torch.int32,
    )
    tensors = stored_by_name(spec(group_size=-1), LayerShape(out_features=N, in_features=K))
    assert torch.equal(tensors["qweight"].encode(codes), expected)
    assert torch.equal(tensors["qweight"].decode(expected), codes)
    assert tensors["qzeros"].shape == (1, 2)
    assert tensors["scales"].shape == (1, 16)


def test_gemv_packs_inputs_in_order_and_pads_groups():
    N, K = 3, 192  # 3 groups of 64: one word of zero-points, padded to two
    shape = LayerShape(out_features=N, in_features=K)
    gemv = spec(group_size=64).model_copy(update={"variant": "gemv"})
    tensors = stored_by_name(gemv, shape)
    codes = torch.randint(16, (N, K), dtype=torch.uint8)
    zeros = torch.randint(16, (N, 3), dtype=torch.uint8)
    expected = torch.tensor(
        [[word(codes[n, 8 * w : 8 * w + 8]) for w in range(K // 8)] for n in range(N)],
        dtype=torch.int32,
    )
    assert torch.equal(tensors["qweight"].encode(codes), expected)
    packed = torch.tensor([[word(row), 0] for row in zeros], dtype=torch.int32)
    assert torch.equal(tensors["qzeros"].encode(zeros), packed)
    assert tensors["scales"].shape == (N, 16)


def test_zero_points_may_lack_where_symmetric():
    shape = LayerShape(out_features=16, in_features=128)
    assert stored_by_name(spec(symmetric=True), shape)["qzeros"].optional
    assert not stored_by_name(spec(), shape)["qzeros"].optional


@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128, 96])
@pytest.mark.parametrize("zero_point", [True, False])
def test_parse(group_size, zero_point):
    config = {**CONFIG, "group_size": group_size, "zero_point": zero_point}
    rules = awq.parse(config)
    assert rules.default == spec(group_size=group_size, symmetric=not zero_point)
    assert rules.scheme_for("model.layers.0.mlp.up_proj") == rules.default
    assert rules.scheme_for("lm_head") is None


def test_parse_takes_autoawq_names_and_tolerates_others():
    config = {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "producer": "x", "backend": 1}
    assert awq.parse(config).default == spec(group_size=64)


def test_parse_gptqmodel_names():
    config = {"bits": 4, "group_size": 128, "format": "gemv", "checkpoint_format": "gemv"}
    default = awq.parse(config).default
    assert default is not None
    assert default.variant == "gemv"


def test_skip_list_matches_parts_of_names():
    rules = awq.parse({**CONFIG, "modules_to_not_convert": ["visual", "layers.1.", "a.b"]})
    assert rules.scheme_for("model.visual.blocks.0.attn.qkv") is None
    assert rules.scheme_for("model.layers.1.mlp.up_proj") is None
    assert rules.scheme_for("model.layers.11.mlp.up_proj") is not None
    assert rules.scheme_for("model.axb") is not None  # the dot is no wildcard


def test_null_skip_list_and_quantised_head():
    rules = awq.parse({**CONFIG, "modules_to_not_convert": None, "lm_head": True})
    assert rules.scheme_for("lm_head") == rules.default


def test_render_declares_zero_points_always():
    assert awq.parse(awq.render({"c": spec(symmetric=True)}, ())).default == spec()
    rules = awq.parse(awq.render({"c": spec(group_size=-1)}, ("router",)))
    assert rules.default == spec(group_size=-1)
    assert rules.scheme_for("model.layers.0.mlp.router") is None
