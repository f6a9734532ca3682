"""fp8 and fbgemm_fp8: configs as published, and what their tensors mean."""

import pytest
import torch
from transformers import FbgemmFp8Config, FineGrainedFP8Config

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats import Role, get_format
from vllm_quantkit.spec import ALL_ROWS, ActivationSpec, LayerShape, SchemeSpec, WeightSpec

LAYER = "model.layers.3.mlp.down_proj"

LLAMA_STATIC = {  # Meta-Llama-3-8B-Instruct-FP8
    "activation_scheme": "static",
    "ignored_layers": ["lm_head"],
    "quant_method": "fp8",
}
DEEPSEEK_V3 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
QWEN3_BLOCK = {
    **DEEPSEEK_V3,
    "scale_fmt": "ue8m0",
    "modules_to_not_convert": ["model.layers.3.mlp", "lm_head", "model.layers.1.self_attn.q_proj"],
    "dequantize": False,
}
LLAMA_405B = {
    "quant_method": "fbgemm_fp8",
    "activation_scale_ub": 1200.0,
    "modules_to_not_convert": ["model.layers.0.self_attn.q_proj", "model.layers.125.mlp.up_proj"],
}


def weight(**numerics):
    return WeightSpec(bits=8, symmetric=True, **{"group_size": -1, "code_type": "e4m3", **numerics})


PER_TENSOR = weight(scale_rows=ALL_ROWS)
BLOCKS = weight(group_size=128, scale_rows=128)


def fp8(numerics=PER_TENSOR, **activation):
    return SchemeSpec(
        dialect="fp8", weight=numerics, activation=ActivationSpec(code="e4m3", **activation)
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA_STATIC, fp8(dynamic=False, group_size=0)),
        (DEEPSEEK_V3, fp8(BLOCKS, group_size=128)),
        ({"quant_method": "fp8"}, fp8()),
        ({"activation_scheme": "dynamic", "modules_to_not_convert": None}, fp8()),
        ({"weight_block_size": None, "fmt": None}, fp8()),
        ({"fmt": "E5M2"}, fp8(weight(scale_rows=ALL_ROWS, code_type="e5m2"))),
        (
            {"weight_block_size": [64, 32]},
            fp8(weight(group_size=32, scale_rows=64), group_size=32),
        ),
    ],
)
def test_parse_fp8(config, expected):
    rules = get_format("fp8").parse(config)
    assert rules.default == expected
    assert rules.scheme_for(LAYER) == expected
    assert rules.scheme_for("lm_head") is None


def test_skipped_modules_and_all_inside_them():
    rules = get_format("fp8").parse({**QWEN3_BLOCK, "ignored_layers": [r"re:.*\.\d\.gate"]})
    for name in (LAYER, "language_model.lm_head", "model.layers.1.self_attn.q_proj", "a.1.gate"):
        assert rules.scheme_for(name) is None
    for name in ("model.layers.31.mlp.x", "model.layers.1.self_attn.q_proj_b", "a.gate"):
        assert rules.scheme_for(name) == fp8(BLOCKS, group_size=128)


def test_parse_fbgemm():
    rules = get_format("fbgemm_fp8").parse(LLAMA_405B)
    expected = SchemeSpec(
        dialect="fbgemm_fp8",
        weight=weight(),
        activation=ActivationSpec(code="e4m3", upper_bound=1200.0),
    )
    assert rules.scheme_for(LAYER) == expected
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.125.mlp.up_proj", "lm_head"):
        assert rules.scheme_for(name) is None
    unbounded = get_format("fbgemm_fp8").parse({"activation_scale_ub": None}).default
    assert unbounded.activation.upper_bound is None


def tensors(spec, N, K):
    found = get_format(spec.dialect).tensors(spec, LayerShape(out_features=N, in_features=K))
    return {tensor.name: tensor for tensor in found}


@pytest.mark.parametrize("code_type", ["e4m3", "e5m2"])
def test_codes_are_the_bits_of_the_floats(code_type):
    stored = torch.randn(5, 7).to(torch.float8_e4m3fn if code_type == "e4m3" else torch.float8_e5m2)
    tensor = tensors(fp8(weight(code_type=code_type, scale_rows=ALL_ROWS)), 5, 7)["weight"]
    codes = tensor.decode(stored)
    assert torch.equal(codes.view(stored.dtype).float(), stored.float())
    assert torch.equal(tensor.encode(codes).float(), stored.float())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_shape_of_a_scale(shape, dtype):
    tensor = tensors(fp8(), 6, 40)["weight_scale"]
    stored = (torch.rand(shape) + 0.5).to(dtype)
    assert tensor.admits(shape)
    assert torch.equal(tensor.decode(stored), stored.float().reshape(-1, 1).expand(6, 1))


@pytest.mark.parametrize("shape", [(2,), (40,), (1, 6), (6, 2), (6, 1, 1)])
def test_other_shapes_of_a_scale_are_not_admitted(shape):
    assert not tensors(fp8(), 6, 40)["weight_scale"].admits(shape)
    assert not tensors(fp8(weight(scale_rows=1)), 6, 40)["weight_scale"].admits((1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize(("N", "K"), [(256, 128), (130, 300), (64, 100), (129, 1)])
def test_block_scales_are_multiplied(N, K, dtype):
    """Against the definition: entry by entry, the scale of the block it lies in."""
    tensor = tensors(fp8(BLOCKS, group_size=128), N, K)["weight_scale_inv"]
    R, C = -(-N // 128), -(-K // 128)
    stored = torch.exp2(torch.arange(R * C).float()).view(R, C).to(dtype)
    assert tensor.shape == (R, C)
    assert dtype in tensor.dtypes
    expected = torch.tensor([[float(stored[n // 128, c]) for c in range(C)] for n in range(N)])
    assert torch.equal(tensor.decode(stored), expected)


def test_rows_that_differ_are_not_stored_once():
    scales = torch.tensor([[1.0], [1.0], [2.0]])
    with pytest.raises(ValueError, match=r"rows differ inside a block of 3 .*every row"):
        tensors(fp8(), 3, 8)["weight_scale"].encode(scales)
    halves = tensors(fp8(weight(group_size=8, scale_rows=2), group_size=8), 3, 8)
    assert halves["weight_scale_inv"].encode(scales).tolist() == [[1.0], [2.0]]


def test_input_scale():
    static = tensors(fp8(dynamic=False, group_size=0), 6, 40)["input_scale"]
    assert (static.role, static.optional) == (Role.INPUT_SCALE, False)
    for shape in ((), (1,), (1, 1)):
        assert static.admits(shape)
        assert static.decode(torch.full(shape, 0.25)).tolist() == [0.25]
    dynamic = tensors(fp8(), 6, 40)["input_scale"]
    assert (dynamic.role, dynamic.optional) == (Role.MARK, True)  # there, but not used


def fbgemm(bound=1200.0, **numerics):
    activation = ActivationSpec(code="e4m3", upper_bound=bound)
    return SchemeSpec(dialect="fbgemm_fp8", weight=weight(**numerics), activation=activation)


def test_stored_bound_must_be_the_configs():
    tensor = tensors(fbgemm(), 6, 40)["input_scale_ub"]
    assert tensor.optional
    assert tensor.decode(torch.tensor(1200.0)).tolist() == [1200.0]
    assert tensor.decode(torch.tensor([1200.0]).bfloat16()).tolist() == [1200.0]
    with pytest.raises(ValueError, match=r"it holds 1000\.0, but the config's .* is 1200\.0"):
        tensor.decode(torch.tensor([1000.0]))
    with pytest.raises(ValueError, match="activation_scale_ub is None"):
        tensors(fbgemm(bound=None), 6, 40)["input_scale_ub"].decode(torch.tensor([1.0]))


@pytest.mark.parametrize(
    "spec",
    [
        fp8(),
        fp8(dynamic=False, group_size=0),
        fp8(BLOCKS, group_size=128),
        fp8(weight(code_type="e5m2", scale_rows=ALL_ROWS)),
        fbgemm(),
        fbgemm(bound=None),
    ],
)
def test_render_is_what_parse_reads(spec):
    fmt = get_format(spec.dialect)
    rules = fmt.parse(fmt.render({"c": spec}, ("a.b",)))
    assert rules.default == spec
    assert rules.scheme_for("model.a.b.c") is None
    assert rules.scheme_for("lm_head") is None


@pytest.mark.parametrize(
    "spec",
    [
        fp8(WeightSpec(bits=8, group_size=-1, symmetric=True)),
        fp8(weight(group_size=128, scale_rows=ALL_ROWS)),
        fbgemm(scale_rows=ALL_ROWS),
        fbgemm(code_type="e5m2"),
    ],
)
def test_refuses_what_the_dialect_cannot_store(spec):
    fmt = get_format(spec.dialect)
    with pytest.raises(UnsupportedScheme, match=r"cannot store 8 bits .* Use the dialect 'compre"):
        fmt.tensors(spec, LayerShape(out_features=8, in_features=8))
    with pytest.raises(UnsupportedScheme, match="cannot store 8 bits"):
        fmt.render({"c": spec}, ())


def test_transformers_reads_what_we_render():
    block = FineGrainedFP8Config(
        **get_format("fp8").render({"c": fp8(BLOCKS, group_size=128)}, ("a",))
    )
    assert (block.activation_scheme, block.weight_block_size) == ("dynamic", [128, 128])
    assert block.modules_to_not_convert == ["a", "lm_head"]
    meta = FbgemmFp8Config.from_dict(get_format("fbgemm_fp8").render({"c": fbgemm()}, ("a",)))
    assert meta.activation_scale_ub == 1200.0
    assert meta.modules_to_not_convert == ["a", "lm_head"]
