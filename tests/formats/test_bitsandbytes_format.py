"""bitsandbytes: an encoder written here from the format's definition, and what we read of it."""

import pytest
import torch
from transformers import BitsAndBytesConfig

from quantkit_kernels.code_types import code_values
from tests.bitsandbytes_encoder import BLOCK, NESTED_BLOCK, as_bytes, encode
from vllm_quantkit.errors import CheckpointError, UnsupportedScheme
from vllm_quantkit.formats import Role
from vllm_quantkit.formats import bitsandbytes as fmt
from vllm_quantkit.spec import ActivationSpec, LayerShape, SchemeSpec, WeightSpec

LLM_INT8 = {
    "_load_in_4bit": False,
    "_load_in_8bit": True,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": False,
    "load_in_8bit": True,
    "quant_method": "bitsandbytes",
}
NF4_DOUBLE = {
    **LLM_INT8,
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "model.layers.1.mlp"],
    "load_in_4bit": True,
    "load_in_8bit": False,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def int8_spec(threshold=6.0):
    return SchemeSpec(
        dialect="bitsandbytes",
        weight=WeightSpec(bits=8, group_size=-1, symmetric=True),
        activation=ActivationSpec(code="int8", outlier_threshold=threshold),
    )


def four_spec(code_type="nf4"):
    weight = WeightSpec(bits=4, group_size=BLOCK, symmetric=True, code_type=code_type)
    return SchemeSpec(dialect="bitsandbytes", weight=weight)


def test_parse_llm_int8():
    rules = fmt.parse(LLM_INT8)
    assert rules.scheme_for("model.layers.0.mlp.up_proj") == int8_spec()
    assert rules.scheme_for("lm_head") is None
    assert fmt.parse({**LLM_INT8, "llm_int8_threshold": 0.0}).default == int8_spec(None)
    assert fmt.parse({"load_in_8bit": True}).default == int8_spec()


def test_parse_four_bits():
    rules = fmt.parse(NF4_DOUBLE)
    assert rules.scheme_for("model.layers.11.mlp.up_proj") == four_spec()
    for name in ("lm_head", "model.layers.1.mlp.up_proj", "a.multi_modal_projector.linear_1"):
        assert rules.scheme_for(name) is None
    assert fmt.parse({"load_in_4bit": True}).default == four_spec("fp4")


def test_a_skip_list_without_the_head_quantises_it():
    assert fmt.parse({**LLM_INT8, "llm_int8_skip_modules": []}).lm_head == int8_spec()


@pytest.mark.parametrize("threshold", [6.0, None])
def test_render_is_what_parse_and_transformers_read(threshold):
    written = fmt.render({"c": int8_spec(threshold)}, ("a.b",))
    rules = fmt.parse(written)
    assert rules.default == int8_spec(threshold)
    assert rules.scheme_for("lm_head") is None
    config = BitsAndBytesConfig.from_dict(written)
    assert config.load_in_8bit
    assert config.llm_int8_threshold == (threshold or 0.0)
    assert config.llm_int8_skip_modules == ["a.b", "lm_head"]


def test_four_bits_are_not_written():
    with pytest.raises(UnsupportedScheme, match="read, but not written"):
        fmt.render({"c": four_spec()}, ())


def test_refuses_what_the_dialect_cannot_store():
    spec = SchemeSpec(
        dialect="bitsandbytes",
        weight=WeightSpec(bits=8, group_size=-1, symmetric=True, code_type="e4m3"),
    )
    with pytest.raises(UnsupportedScheme, match="cannot store 8 bits of 'e4m3'"):
        fmt.tensors(spec, LayerShape(out_features=8, in_features=8))


def test_int8_rows():
    """W = SCB / 127 * int8, within half a step of what was quantised."""
    N, K = 7, 20
    weight = torch.randn(N, K)
    maxima = weight.abs().amax(1)
    stored = {"weight": (weight * 127 / maxima[:, None]).round().to(torch.int8), "SCB": maxima}
    tensors = fmt.tensors(int8_spec(), LayerShape(out_features=N, in_features=K))
    values = {t.role: t.decode(stored[t.name]) for t in tensors if t.name in stored}
    read = (values[Role.CODES].float() - 128) * values[Role.SCALES]
    # Rounding to a step of maxima / 127 errs by at most half of it, and float32 by a little more.
    assert bool(((read - weight).abs() <= maxima[:, None] / 127 * 0.50001).all())


def test_only_rows_in_order_are_served():
    tensors = fmt.tensors(int8_spec(), LayerShape(out_features=4, in_features=4))
    mark = next(tensor for tensor in tensors if tensor.role is Role.MARK)
    assert mark.optional
    assert int(mark.decode(torch.tensor(0, dtype=torch.uint8))) == 0
    with pytest.raises(ValueError, match="weight_format 2 is a layout"):
        mark.decode(torch.tensor([2], dtype=torch.uint8))


def assembled(stored, shape, code_type="nf4"):
    size = LayerShape(out_features=shape[0], in_features=shape[1])
    return fmt.assemble(stored, size, four_spec(code_type))


@pytest.mark.parametrize("code_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (3, 128), (17, 192), (300, 64)])
def test_four_bits(code_type, double, shape):
    stored, expected = encode(torch.randn(shape), code_type, double=double)
    found = assembled(stored, shape, code_type)
    codes, scales = found[Role.CODES], found[Role.SCALES]
    assert (codes.dtype, codes.shape) == (torch.uint8, shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (shape[0], shape[1] // BLOCK))
    read = code_values(code_type)[codes.long()] * scales.repeat_interleave(BLOCK, dim=1)
    assert torch.equal(read, expected)


def test_the_first_code_is_in_the_high_bits():
    stored, _ = encode(torch.randn(1, 64), "nf4", double=False)
    stored["weight"][0] = 0x2A
    assert assembled(stored, (1, 64))[Role.CODES][0, :2].tolist() == [2, 10]


@pytest.mark.parametrize("shape", [(4, 64), (3, 5)])
def test_codes_round_trip(shape):
    size = LayerShape(out_features=shape[0], in_features=shape[1])
    (tensor,) = fmt.tensors(four_spec(), size)
    codes = torch.randint(16, shape, dtype=torch.uint8)
    stored = tensor.encode(codes)
    assert stored.shape == tensor.shape
    assert tensor.admits((1, stored.numel()))
    assert torch.equal(tensor.decode(stored), codes)
    with pytest.raises(ValueError, match="must be below 16"):
        tensor.encode(torch.full(shape, 16, dtype=torch.uint8))


def test_a_shape_that_is_not_stored_is_not_compared():
    stored, expected = encode(torch.randn(2, 64), "nf4", double=False)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "shape": None}
    stored[STATE] = as_bytes(state)
    scales = assembled(stored, (2, 64))[Role.SCALES]
    assert torch.equal(scales[:, 0], expected.abs().amax(1))


STATE = "weight.quant_state.bitsandbytes__nf4"
GOOD_STATE = {"quant_type": "nf4", "blocksize": BLOCK, "shape": [4, 128]}
NESTED = {"nested_blocksize": NESTED_BLOCK, "nested_offset": 0.5}


def removed(name):
    return lambda stored: stored.pop(name)


def replaced(name, value):
    return lambda stored: stored.update({name: value})


FAULTS = [
    (False, removed("weight.absmax"), "it lacks weight.absmax; add the tensor"),
    (False, removed("weight.quant_map"), "it lacks weight.quant_map; add"),
    (False, removed(STATE), "it lacks weight.quant_state.bitsandbytes__nf4 or .*fp4; add"),
    (False, removed("weight"), "it lacks weight; add"),
    (True, removed("weight.nested_absmax"), "it lacks weight.nested_absmax; add"),
    (True, removed("weight.nested_quant_map"), "it lacks weight.nested_quant_map; add"),
    (False, replaced("weight.quant_map", code_values("fp4")), "not the code book of 'nf4'"),
    (False, replaced("weight.quant_map", torch.ones(3)), "not the code book of 'nf4'"),
    (False, replaced("weight.absmax", torch.ones(9)), r"9 scales do not fit 4 x 128 .* and 8;"),
    (False, replaced("weight", torch.ones(7, 1, dtype=torch.uint8)), "its 7 elements of"),
    (False, replaced("weight", torch.ones(256, 1)), "256 elements of torch.float32"),
    (True, replaced("weight.nested_absmax", torch.ones(2)), r"2 scales, but uint8, 256 and 1"),
    (True, replaced("weight.nested_quant_map", torch.ones(16)), "a map of 16 values"),
    (True, replaced("weight.absmax", torch.ones(8, dtype=torch.int32)), r"are torch\.int32"),
    (True, replaced(STATE, as_bytes(GOOD_STATE)), "has no nested_blocksize and nested_offset"),
    (True, replaced(STATE, as_bytes({**GOOD_STATE, "quant_type": "af4"})), "quant_type: Input"),
    (False, replaced(STATE, torch.ones(3, dtype=torch.uint8)), "not what bitsandbytes writes"),
    (False, replaced(STATE, as_bytes({**GOOD_STATE, "blocksize": 128})), "blocks of 128 and"),
    (False, replaced(STATE, as_bytes({**GOOD_STATE, "shape": [128, 4]})), r"shape \[128, 4\]"),
    (False, replaced(STATE, as_bytes({**GOOD_STATE, "quant_type": "fp4"})), "says fp4, blocks"),
]


@pytest.mark.parametrize(("double", "change", "message"), FAULTS)
def test_faults_of_four_bits(double, change, message):
    stored, _ = encode(torch.randn(4, 128), "nf4", double=double)
    change(stored)
    with pytest.raises(ValueError, match=message):
        assembled(stored, (4, 128))


def test_blocks_that_cross_rows_are_refused():
    stored, _ = encode(torch.randn(4, 96), "nf4", double=False)
    with pytest.raises(ValueError, match="rows of 96 weights are no multiple of the block size 64"):
        assembled(stored, (4, 96))


def test_the_size_of_four_bits_is_in_their_state():
    shapes = {"weight": (256, 1), "weight.absmax": (8,), "weight.quant_map": (16,), STATE: (90,)}
    size = LayerShape(out_features=4, in_features=128)
    assert fmt.infer_shape(four_spec(), shapes, (4, 128)) == size
    with pytest.raises(CheckpointError, match="nf4 holds no shape"):
        fmt.infer_shape(four_spec(), shapes)
    for name in ("weight.absmax", "weight.quant_map", STATE):
        rest = {key: shape for key, shape in shapes.items() if key != name}
        with pytest.raises(CheckpointError, match=f"{name} is missing; the layer has weight"):
            fmt.infer_shape(four_spec(), rest, (4, 128))
    assert fmt.infer_shape(int8_spec(), {"weight": (4, 128)}) == size
