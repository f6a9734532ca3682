"""compressed-tensors with an element per weight: the library compresses, we decode its weights."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)

from quantkit_kernels.code_types import code_values
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats import Role
from vllm_quantkit.formats import compressed_tensors as fmt
from vllm_quantkit.spec import ALL_ROWS, ActivationSpec, LayerShape, SchemeSpec, WeightSpec

N, K, GROUP, BLOCK = 12, 48, 16, (4, 16)
SHAPE = LayerShape(out_features=N, in_features=K)

TABLES = {"tensor": (1,), "channel": (N, 1), "group": (N, K // GROUP), "block": (3, 3)}
"""Strategy to the shape of the library's scales; it decompresses whole blocks only."""

CASES = [
    *(("naive-quantized", "float", 8, True, strategy) for strategy in TABLES),
    *(("float-quantized", "float", 8, True, strategy) for strategy in TABLES),
    *(("int-quantized", "int", 8, True, strategy) for strategy in ("tensor", "channel")),
    *(
        ("naive-quantized", "int", bits, symmetric, strategy)
        for bits in (3, 4, 8)
        for symmetric in (True, False)
        for strategy in ("tensor", "channel", "group")
    ),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def library_args(kind, bits, symmetric, strategy):
    return QuantizationArgs(
        num_bits=bits,
        type=kind,
        symmetric=symmetric,
        strategy=strategy,
        group_size=GROUP if strategy == "group" else None,
        block_structure=list(BLOCK) if strategy == "block" else None,
    )


def compress(stored_format, args):
    """A random layer as the library stores it, and what it reads from that."""
    library = BaseCompressor.get_value_from_registry(stored_format)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=stored_format)
    half, table = 2 ** (args.num_bits - 1), TABLES[args.strategy]
    state = {"weight": torch.randn(N, K), "weight_scale": torch.rand(table) / half + 1e-3}
    if not args.symmetric:
        zeros = torch.randint(-half, half, table, dtype=torch.int8)
        state["weight_zero_point"] = zeros
    stored = library.compress(state, scheme)
    return scheme, stored, library.decompress(stored, scheme)["weight"]


def config(scheme, **extra):
    group = scheme.model_dump(mode="json")
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **extra}


def decode(stored, spec):
    """Our float weight of the library's tensors."""
    tensors = fmt.tensors(spec, SHAPE)
    assert {tensor.name for tensor in tensors} == set(stored)
    for tensor in tensors:
        assert tensor.admits(stored[tensor.name].shape)
        assert stored[tensor.name].dtype in tensor.dtypes
    values = {tensor.role: tensor.decode(stored[tensor.name]) for tensor in tensors}
    weight, scales = spec.weight, values[Role.SCALES]
    index = torch.arange(K) // (K if weight.group_size == -1 else weight.group_size)
    codes = values[Role.CODES]
    if weight.code_type == "e4m3":
        return code_values("e4m3")[codes.long()] * scales[:, index]
    zeros = values.get(Role.ZEROS, torch.full(scales.shape, 2 ** (weight.bits - 1)))
    return (codes.float() - zeros.float()[:, index]) * scales[:, index]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decodes_what_the_library_compresses(case):
    scheme, stored, expected = compress(case[0], library_args(*case[1:]))
    spec = fmt.parse(config(scheme)).default
    assert (spec.variant, spec.activation) == (case[0], None)
    assert torch.equal(decode(stored, spec), expected.float())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_encodes_the_tensors_of_the_library(case):
    scheme, stored, _ = compress(case[0], library_args(*case[1:]))
    for tensor in fmt.tensors(fmt.parse(config(scheme)).default, SHAPE):
        again = tensor.encode(tensor.decode(stored[tensor.name]))
        assert again.shape == stored[tensor.name].shape
        assert again.dtype == stored[tensor.name].dtype
        assert torch.equal(again.float(), stored[tensor.name].float())


def test_values_outside_their_bits_are_refused():
    spec = weight_only("int", bits=4)
    codes = next(tensor for tensor in fmt.tensors(spec, SHAPE) if tensor.role is Role.CODES)
    assert codes.decode(torch.tensor([[-8, 7]], dtype=torch.int8)).tolist() == [[0, 15]]
    with pytest.raises(ValueError, match=r"lie in -8 \.\. 7, but these in 0 \.\. 8"):
        codes.decode(torch.tensor([[0, 8]], dtype=torch.int8))


def scheme_spec(stored_format, activation=None, **weight):
    numerics = {"bits": 8, "group_size": -1, "symmetric": True, **weight}
    return SchemeSpec(
        dialect="compressed-tensors",
        variant=stored_format,
        weight=WeightSpec(**numerics),
        activation=activation,
    )


def weight_only(code_type, **weight):
    return scheme_spec("naive-quantized", code_type=code_type, **weight)


ROW = {
    "actorder": None,
    "block_structure": None,
    "dynamic": True,
    "group_size": None,
    "observer": None,
    "observer_kwargs": {},
}
WEIGHT = {**ROW, "dynamic": False, "observer": "minmax"}


def published(stored_format, weights, inputs, **extra):
    """A config as llm-compressor writes it."""
    group = {
        "input_activations": None if inputs is None else {**ROW, **inputs},
        "output_activations": None,
        "targets": ["Linear"],
        "weights": {**WEIGHT, **weights},
    }
    return {
        "config_groups": {"group_0": group},
        "format": stored_format,
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        **extra,
    }


def numerics(kind, strategy, **more):
    return {"num_bits": 8, "symmetric": True, "type": kind, "strategy": strategy, **more}


DENSE = {"format": "dense", "global_sparsity": 0.14, "sparsity_structure": "unstructured"}

PUBLISHED = {
    "FP8-dynamic": (
        published("float-quantized", numerics("float", "channel"), numerics("float", "token")),
        scheme_spec("float-quantized", ActivationSpec(code="e4m3"), code_type="e4m3"),
    ),
    "FP8 static": (
        published(
            "float-quantized",
            numerics("float", "tensor"),
            numerics("float", "tensor", dynamic=False),
            sparsity_config=DENSE,
        ),
        scheme_spec(
            "float-quantized",
            ActivationSpec(code="e4m3", dynamic=False, group_size=0),
            code_type="e4m3",
            scale_rows=ALL_ROWS,
        ),
    ),
    "FP8 block": (
        published(
            "float-quantized",
            numerics("float", "block", block_structure=[128, 64]),
            numerics("float", "group", group_size=64),
        ),
        scheme_spec(
            "float-quantized",
            ActivationSpec(code="e4m3", group_size=64),
            code_type="e4m3",
            group_size=64,
            scale_rows=128,
        ),
    ),
    "FP8 block, as older versions write it": (
        published("naive-quantized", numerics("float", "block", block_structure="128x64"), None),
        weight_only("e4m3", group_size=64, scale_rows=128),
    ),
    "W8A8 dynamic": (
        published("int-quantized", numerics("int", "channel"), numerics("int", "token")),
        scheme_spec("int-quantized", ActivationSpec(code="int8")),
    ),
    "W8A8 dynamic asymmetric": (
        published(
            "int-quantized", numerics("int", "channel"), numerics("int", "token", symmetric=False)
        ),
        scheme_spec("int-quantized", ActivationSpec(code="int8", symmetric=False)),
    ),
    "W8A8 with zero-points on both sides": (
        published(
            "int-quantized",
            numerics("int", "channel", symmetric=False),
            numerics("int", "token", symmetric=False),
        ),
        scheme_spec("int-quantized", ActivationSpec(code="int8", symmetric=False), symmetric=False),
    ),
    "W8A8 static asymmetric": (
        published(
            "int-quantized",
            numerics("int", "channel"),
            numerics("int", "tensor", symmetric=False, dynamic=False),
        ),
        scheme_spec(
            "int-quantized",
            ActivationSpec(code="int8", dynamic=False, group_size=0, symmetric=False),
        ),
    ),
    "a dynamic scale for all tokens": (
        published("int-quantized", numerics("int", "tensor"), numerics("int", "tensor")),
        scheme_spec(
            "int-quantized", ActivationSpec(code="int8", group_size=0), scale_rows=ALL_ROWS
        ),
    ),
    "W8A16 float": (
        published("naive-quantized", numerics("float", "channel"), None),
        weight_only("e4m3"),
    ),
    "W8A16 integers in groups": (
        published(
            "naive-quantized", numerics("int", "group", symmetric=False, group_size=32), None
        ),
        weight_only("int", group_size=32, symmetric=False),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parse(name):
    rules = fmt.parse(PUBLISHED[name][0])
    assert rules.default == PUBLISHED[name][1]
    assert rules.scheme_for("lm_head") is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_render_is_what_parse_and_the_library_read(name):
    spec = PUBLISHED[name][1]
    written = fmt.render({"c": spec}, ("a.b",))
    rules = fmt.parse(written)
    assert rules.default == spec
    assert rules.scheme_for("a.b") is None
    group = QuantizationConfig.model_validate(written).config_groups["group_0"]
    assert (group.weights.num_bits, group.weights.symmetric) == (8, spec.weight.symmetric)
    assert (group.input_activations is None) == (spec.activation is None)


def test_formats_may_differ_by_group():
    config = published("mixed-precision", numerics("int", "channel"), None)
    config["config_groups"]["group_0"]["format"] = "naive-quantized"
    packed = {
        "targets": ["re:.*down_proj"],
        "weights": {"num_bits": 4, "strategy": "channel"},
        "format": "pack-quantized",
    }
    config["config_groups"]["group_1"] = packed
    rules = fmt.parse(config)
    assert rules.scheme_for("a.up_proj") == weight_only("int")
    assert rules.scheme_for("a.down_proj").variant == "pack-quantized"


def names(spec):
    return {tensor.name: tensor for tensor in fmt.tensors(spec, SHAPE)}


def test_static_activations_have_tensors():
    static = names(PUBLISHED["W8A8 static asymmetric"][1])
    assert set(static) == {"weight", "weight_scale", "input_scale", "input_zero_point"}
    zero = static["input_zero_point"]
    assert zero.role is Role.INPUT_ZERO
    assert zero.admits(())
    assert zero.decode(torch.tensor([-7], dtype=torch.int8)).tolist() == [-7.0]
    assert zero.encode(torch.tensor([-7.0])).dtype is torch.int8
    assert static["input_scale"].decode(torch.tensor([0.5])).tolist() == [0.5]
    assert set(names(PUBLISHED["FP8 static"][1])) == {"weight", "weight_scale", "input_scale"}
    assert set(names(PUBLISHED["W8A8 dynamic"][1])) == {"weight", "weight_scale"}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_every_shape_of_a_scale_per_tensor(shape):
    scale = names(PUBLISHED["FP8 static"][1])["weight_scale"]
    assert scale.admits(shape)
    assert torch.equal(scale.decode(torch.full(shape, 0.5)), torch.full((N, 1), 0.5))
    assert not scale.admits((N, 1))


def test_refuses_code_books():
    with pytest.raises(UnsupportedScheme, match="cannot store 4 bits of 'nf4'"):
        fmt.tensors(weight_only("nf4", bits=4), SHAPE)
