"""compressed-tensors: what the library itself compresses, we decode to exactly its weights."""

import itertools

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from quantkit_kernels.packing import pack_stream
from vllm_quantkit.formats import Role
from vllm_quantkit.formats import _compressed_tensors_packed as packed
from vllm_quantkit.formats import compressed_tensors as fmt
from vllm_quantkit.spec import LayerShape, SchemeSpec, WeightSpec

N, K, GROUP = 13, 48, 12
LIBRARY = BaseCompressor.get_value_from_registry("pack-quantized")

CASES = [
    case
    for case in itertools.product(range(2, 9), (True, False), ("group", "channel"), (None, "group"))
    if case[2:] != ("channel", "group")
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def library_scheme(bits, symmetric, strategy, actorder=None):
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=GROUP if strategy == "group" else None,
        actorder=actorder,
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


def compress(scheme, scale_dtype):
    """A random layer as the library stores it."""
    args = scheme.weights
    groups = K // GROUP if args.strategy == "group" else 1
    half = 2 ** (args.num_bits - 1)
    state = {
        "weight": torch.randn(N, K),
        "weight_scale": (torch.rand(N, groups) / half + 1e-3).to(scale_dtype),
        "weight_zero_point": torch.zeros(N, groups, dtype=torch.int8),
    }
    if not args.symmetric:
        state["weight_zero_point"].random_(-half, half)
    if args.actorder:
        state["weight_g_idx"] = (torch.randperm(K) // GROUP).int()
    return LIBRARY.compress(state, scheme)


def decode(stored, spec):
    """Our float weight of the library's tensors."""
    tensors = fmt.tensors(spec, LayerShape(out_features=N, in_features=K))
    assert {tensor.name for tensor in tensors} == set(stored)
    for tensor in tensors:
        assert tensor.shape == tuple(stored[tensor.name].shape)
        assert stored[tensor.name].dtype in tensor.dtypes
    values = {tensor.role: tensor.decode(stored[tensor.name]) for tensor in tensors}
    scales, weight = values[Role.SCALES], spec.weight
    zeros = values.get(Role.ZEROS, torch.full(scales.shape, 2 ** (weight.bits - 1)))
    group_size = K if weight.group_size == -1 else weight.group_size
    index = values.get(Role.GROUP_INDEX, torch.arange(K) // group_size).long()
    return (values[Role.CODES].float() - zeros.float()[:, index]) * scales[:, index]


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "symmetric", "strategy", "actorder"), CASES)
def test_decodes_what_the_library_compresses(bits, symmetric, strategy, actorder, scale_dtype):
    scheme = library_scheme(bits, symmetric, strategy, actorder)
    stored = compress(scheme, scale_dtype)
    spec = fmt.parse(config(scheme.model_dump(mode="json"))).default
    expected = LIBRARY.decompress(stored, scheme)["weight"]
    assert torch.equal(decode(stored, spec).to(scale_dtype), expected)


@pytest.mark.parametrize(("bits", "symmetric", "strategy", "actorder"), CASES)
def test_encodes_the_words_of_the_library(bits, symmetric, strategy, actorder):
    scheme = library_scheme(bits, symmetric, strategy, actorder)
    stored = compress(scheme, torch.float16)
    spec = fmt.parse(config(scheme.model_dump(mode="json"))).default
    for tensor in fmt.tensors(spec, LayerShape(out_features=N, in_features=K)):
        again = tensor.encode(tensor.decode(stored[tensor.name]))
        assert torch.equal(again, stored[tensor.name])


def test_unset_group_index_means_groups_in_order():
    spec = fmt.parse(config({**GROUP_0, "weights": {**WEIGHTS, "actorder": "group"}})).default
    tensors = fmt.tensors(spec, LayerShape(out_features=8, in_features=256))
    index = next(tensor for tensor in tensors if tensor.role is Role.GROUP_INDEX)
    stored = torch.full((256,), -1, dtype=torch.int32)
    assert torch.equal(index.decode(stored), (torch.arange(256) // 128).int())
    assert int(stored.max()) == -1


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
GROUP_0 = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}


def config(*groups, **extra):
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups or (GROUP_0,))},
        "ignore": ["lm_head"],
        "version": "0.12.2",
        **extra,
    }


def spec(**weight):
    numerics = {"bits": 4, "group_size": 128, "symmetric": True, **weight}
    return SchemeSpec(
        dialect="compressed-tensors", weight=WeightSpec(**numerics), variant="pack-quantized"
    )


def test_parse():
    rules = fmt.parse(config())
    assert rules.default == spec()
    assert rules.scheme_for("model.layers.0.mlp.up_proj") == spec()
    assert rules.scheme_for("lm_head") is None
    assert fmt.parse(config(ignore=None)).scheme_for("lm_head") == spec()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_bits": 7, "symmetric": False}, spec(bits=7, symmetric=False)),
        ({"strategy": "channel", "group_size": None}, spec(group_size=-1)),
        ({"strategy": "channel", "group_size": -1}, spec(group_size=-1)),
        ({"strategy": None}, spec()),
        ({"strategy": None, "group_size": -1}, spec(group_size=-1)),
        ({"actorder": "group"}, spec(act_order=True)),
        ({"actorder": "dynamic"}, spec(act_order=True)),
        ({"actorder": True}, spec(act_order=True)),
        ({"actorder": "weight"}, spec()),
        ({"actorder": "static"}, spec()),
        ({"type": "INT", "observer": "mse", "observer_kwargs": {}}, spec()),
    ],
)
def test_parse_weights(change, expected):
    assert fmt.parse(config({**GROUP_0, "weights": {**WEIGHTS, **change}})).default == expected


def test_targets_and_ignore():
    eight = {**WEIGHTS, "num_bits": 8}
    rules = fmt.parse(
        config(
            {**GROUP_0, "targets": [r"re:.*down_proj$", "Linear"]},
            {**GROUP_0, "targets": ["model.layers.0.mlp.down_proj"], "weights": eight},
            ignore=["lm_head", "model.layers.1.mlp.down_proj", r"re:.*\.gate$"],
        )
    )
    assert rules.scheme_for("model.layers.0.mlp.down_proj") == spec(bits=8)  # whole name first
    assert rules.scheme_for("model.layers.1.mlp.down_proj") is None
    assert rules.scheme_for("model.layers.2.mlp.down_proj") == spec()
    assert rules.scheme_for("model.layers.1.mlp.down_proj.x") == spec()
    assert rules.scheme_for("model.layers.0.mlp.gate") is None


def test_without_the_class_only_named_layers_are_quantised():
    rules = fmt.parse(config({**GROUP_0, "targets": [r"re:.*mlp.*"]}))
    assert rules.scheme_for("model.layers.0.mlp.up_proj") == spec()
    assert rules.scheme_for("model.layers.0.self_attn.q_proj") is None


def test_attention_groups_are_about_the_kv_cache():
    attention = {"targets": ["LlamaAttention"], "weights": WEIGHTS, "input_activations": {}}
    assert fmt.parse(config(GROUP_0, attention)).schemes == (spec(),)


def test_format_per_group():
    group = {**GROUP_0, "format": "pack-quantized"}
    assert fmt.parse(config(group, format="mixed-precision")).default == spec()


@pytest.mark.parametrize(
    "written", [spec(), spec(bits=3, group_size=-1, symmetric=False), spec(act_order=True)]
)
def test_render_is_what_parse_reads(written):
    rules = fmt.parse(fmt.render({"c": written}, ("a.b", r"re:.*\.gate$")))
    assert rules.default == written
    for name in ("a.b", "x.gate", "lm_head"):
        assert rules.scheme_for(name) is None
    assert rules.scheme_for("a.b.c") == written


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("length", [1, 20, 32, 96, 100, 129])
def test_codes_without_gaps_are_read(bits: int, length: int):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (8, length), generator=generator).to(torch.uint8)
    codes[0] = 2**bits - 1
    assert torch.equal(packed.decode_codes(pack_stream(codes, bits), bits, length), codes)
    assert torch.equal(packed.decode_codes(packed.encode_codes(codes, bits), bits, length), codes)
    zeros = codes.t().contiguous()
    words = pack_stream(zeros.t(), bits).t()
    assert torch.equal(packed.decode_zeros(words, bits, length), zeros)


@pytest.mark.parametrize("bits", [3, 5])
def test_a_layer_admits_both_packings(bits: int):
    weight = WeightSpec(bits=bits, group_size=32, symmetric=False)
    spec = SchemeSpec(dialect="compressed-tensors", weight=weight)
    tensors = fmt.tensors(spec, LayerShape(out_features=64, in_features=96))
    codes = next(tensor for tensor in tensors if tensor.name == "weight_packed")
    zeros = next(tensor for tensor in tensors if tensor.name == "weight_zero_point")
    assert codes.admits((64, 96 * bits // 32))
    assert zeros.admits((64 * bits // 32, 3))
