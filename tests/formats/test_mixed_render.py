"""A config with several schemes says of every layer what it has, and is refused where it cannot."""

import pytest
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit_kernels.act_quant import PER_TENSOR
from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.formats import get_format
from vllm_quantkit.quantize.output.checkpoint import quantization_config
from vllm_quantkit.spec import ALL_ROWS, ActivationSpec, SchemeSpec, WeightSpec

LEAVES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NAMES = [f"model.layers.{i}.{leaf}" for i in range(5) for leaf in LEAVES]
NAMES += [f"model.layers.5.mlp.experts.{e}.{leaf}" for e in range(4) for leaf in ("w1", "w2")]
NAMES += ["model.layers.5.mlp.gate", "visual.blocks.0.attn.qkv", "lm_head"]


def integers(bits, group_size=32, symmetric=True, **other):
    return WeightSpec(bits=bits, group_size=group_size, symmetric=symmetric, **other)


FLOAT = WeightSpec(bits=8, group_size=-1, symmetric=True, code_type="e4m3")
TOKEN_INT8, TOKEN_FP8 = ActivationSpec(code="int8"), ActivationSpec(code="e4m3")
STATIC = ActivationSpec(code="int8", dynamic=False, group_size=PER_TENSOR, symmetric=False)
BLOCKS = FLOAT.model_copy(update={"group_size": 128, "scale_rows": 128})

NUMERICS = {
    "compressed-tensors": [
        *(
            (integers(bits, symmetric=symmetric), None)
            for bits in (2, 3, 4, 8)
            for symmetric in (False, True)
        ),
        (integers(4, -1), None),
        (integers(4, 64, act_order=True), None),
        (integers(8, -1), TOKEN_INT8),
        (integers(8, -1, symmetric=False), TOKEN_INT8),
        (integers(8, -1), STATIC),
        (FLOAT, TOKEN_FP8),
        (FLOAT, None),
        (BLOCKS, ActivationSpec(code="e4m3", group_size=128)),
    ],
    "gptq": [
        (integers(bits, group, act_order=order), None)
        for bits in (2, 3, 4, 8)
        for group, order in ((-1, False), (32, True), (64, False))
    ],
    "quantkit": [
        *((integers(bits, symmetric=bits % 2 == 0), None) for bits in range(2, 9)),
        (integers(3, 50, act_order=True, scale_rows=4), None),
        (integers(8, -1), STATIC),
        (integers(8, -1), ActivationSpec(code="int8", outlier_threshold=6.0)),
        (FLOAT.model_copy(update={"code_type": "e5m2"}), TOKEN_FP8),
        (FLOAT, ActivationSpec(code="e4m3", upper_bound=1200.0)),
        (WeightSpec(bits=4, group_size=64, symmetric=True, code_type="nf4"), None),
    ],
}


def schemes(dialect):
    return [get_format(dialect).scheme(*numerics) for numerics in NUMERICS[dialect]]


@pytest.mark.parametrize("dialect", NUMERICS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_layer_is_read_as_it_was_meant(dialect, data):
    known = schemes(dialect)
    chosen = {name: data.draw(st.sampled_from([None, *known])) for name in NAMES}
    layers = {name: scheme for name, scheme in chosen.items() if scheme is not None}
    ignore = tuple(name for name in NAMES if name not in layers)
    if layers:
        config = quantization_config(layers, ignore)
        rules = get_format(dialect).parse(config)
        assert {name: rules.scheme_for(name) for name in NAMES} == chosen


@pytest.mark.parametrize("dialect", NUMERICS)
def test_a_uniform_model_has_a_short_config(dialect):
    scheme, ignore = schemes(dialect)[0], ("lm_head", "model.layers.5.mlp.gate")
    layers = dict.fromkeys([name for name in NAMES if name not in ignore], scheme)
    config = quantization_config(layers, ignore)
    if dialect == "compressed-tensors":
        (group,) = config["config_groups"].values()
        assert (group["targets"], config["ignore"]) == (["Linear"], list(ignore))
    elif dialect == "gptq":
        assert list(config["dynamic"]) == [r"-:model\.layers\.5\.mlp\.gate$"]
    else:
        assert len(config["groups"]) == 1
        assert len(config["groups"][0]["layers"]) == 4


def test_formats_of_groups_and_the_librarys_word_for_several():
    fmt = get_format("compressed-tensors")
    four = fmt.scheme(integers(4), None)
    floats = fmt.scheme(FLOAT, TOKEN_FP8)
    down = [name for name in NAMES if name.endswith("down_proj")]
    layers = {**dict.fromkeys(NAMES[:35], four), **dict.fromkeys(down, floats)}
    config = fmt.render(layers, ())
    assert config["format"] == "mixed-precision"
    first, last = config["config_groups"].values()
    assert first["targets"] == [r"re:(?:.*\.)?layers\.\d+\.mlp\.down_proj$"]
    assert (first["format"], last["format"]) == ("float-quantized", "pack-quantized")
    assert last["targets"] == ["Linear"]
    QuantizationConfig.model_validate(config)
    eight = fmt.scheme(integers(8), None)
    same = fmt.render({**layers, **dict.fromkeys(down, eight)}, ())
    assert same["format"] == "pack-quantized"


@pytest.mark.parametrize("dialect", ["awq", "fp8"])
def test_dialects_of_one_scheme_refuse_several(dialect):
    weights = {
        "awq": [integers(4, 32, symmetric=False), integers(4, 64, symmetric=False)],
        "fp8": [FLOAT.model_copy(update={"scale_rows": ALL_ROWS}), BLOCKS],
    }
    activations = {
        "awq": [None, None],
        "fp8": [TOKEN_FP8, ActivationSpec(code="e4m3", group_size=128)],
    }
    fmt = get_format(dialect)
    pair = [fmt.scheme(*n) for n in zip(weights[dialect], activations[dialect], strict=True)]
    for scheme in pair:
        config = quantization_config(dict.fromkeys(NAMES[:9], scheme), tuple(NAMES[9:]))
        assert config["quant_method"] == dialect
    with pytest.raises(
        UnsupportedScheme, match=r"one scheme for all layers, but model\.layers\.0\.self"
    ):
        quantization_config({NAMES[0]: pair[0], NAMES[1]: pair[1]}, ())


def test_awq_leaves_out_by_parts_of_names_that_tell():
    scheme = get_format("awq").scheme(integers(4, 32, symmetric=False), None)
    layers = dict.fromkeys([name for name in NAMES if "layers.1.mlp.down" not in name][:30], scheme)
    ignore = ("model.layers.1.mlp.down_proj", "model.layers.5.mlp.gate", "lm_head")
    config = quantization_config(layers, ignore)
    parts = ["layers.1.mlp.down_proj", "layers.5.mlp.gate", "lm_head"]
    assert config["modules_to_not_convert"] == parts
    with pytest.raises(UnsupportedScheme, match=r"'a\.gate' is part of a quantised layer's name"):
        quantization_config({"a.gate_proj": scheme}, ("a.gate",))


def test_gptq_has_one_checkpoint_format():
    fmt = get_format("gptq")
    layers = {
        "a": fmt.scheme(integers(4), None),
        "b": fmt.scheme(integers(4, symmetric=False), None),
    }
    assert (layers["a"].variant, layers["b"].variant) == ("gptq", "gptq_v2")
    with pytest.raises(UnsupportedScheme, match="one checkpoint_format for all layers"):
        quantization_config(layers, ())


def test_a_config_that_reads_back_differently_is_refused():
    """Symmetric AWQ declares zero-points."""
    scheme = SchemeSpec(dialect="awq", weight=integers(4), variant="gemm")
    with pytest.raises(UnsupportedScheme, match=r"'awq' cannot say that a\.b has 4 bits, group 32"):
        quantization_config({"a.b": scheme}, ())


def test_nothing_or_several_dialects_are_refused():
    with pytest.raises(UnsupportedScheme, match="its layers have none"):
        quantization_config({}, ("a",))
    mixed = {name: schemes(name)[0] for name in ("gptq", "quantkit")}
    with pytest.raises(UnsupportedScheme, match="its layers have gptq, quantkit"):
        quantization_config(mixed, ())


UNWRITABLE = [
    ("awq", integers(4), None),
    ("awq", integers(8, symmetric=False), None),
    ("awq", integers(4, -1, symmetric=False), None),
    ("awq", integers(4, 32, symmetric=False, act_order=True), None),
    ("gptq", integers(5), None),
    ("gptq", integers(8, -1), TOKEN_INT8),
    ("gptq", FLOAT, None),
    ("compressed-tensors", integers(4), TOKEN_INT8),
    ("compressed-tensors", integers(4, scale_rows=8), None),
    ("compressed-tensors", FLOAT.model_copy(update={"code_type": "e5m2"}), TOKEN_FP8),
    ("compressed-tensors", FLOAT, ActivationSpec(code="e4m3", upper_bound=3.0)),
    ("compressed-tensors", integers(8, -1), ActivationSpec(code="int8", outlier_threshold=6.0)),
    ("fp8", FLOAT, TOKEN_FP8),
    ("fp8", integers(8, -1), TOKEN_INT8),
    ("quantkit", integers(4), TOKEN_INT8),
    ("quantkit", integers(8, 32), TOKEN_INT8),
    ("quantkit", integers(8, -1), TOKEN_FP8),
    ("quantkit", BLOCKS, ActivationSpec(code="e4m3", group_size=64)),
    ("fbgemm_fp8", FLOAT, TOKEN_FP8),
    ("bitsandbytes", integers(8, -1), TOKEN_INT8),
]


@pytest.mark.parametrize(("dialect", "weight", "activation"), UNWRITABLE)
def test_numerics_that_a_dialect_does_not_write(dialect, weight, activation):
    with pytest.raises((UnsupportedScheme, ConfigError), match=r"\. (Choose|Use|Quantise|Serve) "):
        get_format(dialect).scheme(weight, activation)


def test_a_quantised_head_is_declared():
    for dialect in NUMERICS:
        first, second = schemes(dialect)[:2]
        layers = {**dict.fromkeys(NAMES[:7], first), "lm_head": second}
        rules = get_format(dialect).parse(quantization_config(layers, ()))
        assert rules.scheme_for("lm_head") == second
