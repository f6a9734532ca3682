"""The audit of what 8-bit dialects, 4 bits of bitsandbytes and checkpoints in 16 bits share."""

import json

import pytest
import torch
from safetensors.torch import save_file

from quantkit_kernels.code_types import FLOAT8_DTYPES
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.checkpoint import TensorHeader, audit, read_headers
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.formats import Role, get_format
from vllm_quantkit.quantize.output.checkpoint import exchange_layers
from vllm_quantkit.spec import (
    ALL_ROWS,
    ActivationSpec,
    LayerRules,
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

N, K = 24, 128
SHAPE = LayerShape(out_features=N, in_features=K)
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def spec(dialect, **weight):
    numerics = {"bits": 8, "group_size": -1, "symmetric": True, "code_type": "e4m3", **weight}
    return SchemeSpec(dialect=dialect, weight=WeightSpec(**numerics))


FP8 = spec("fp8", scale_rows=ALL_ROWS)
STATIC = FP8.model_copy(
    update={"activation": ActivationSpec(code="e4m3", dynamic=False, group_size=0)}
)
ON_ARRIVAL = spec("16-bit", code_type="int")
NF4 = spec("bitsandbytes", bits=4, group_size=64, code_type="nf4")
STATE = "weight.quant_state.bitsandbytes__nf4"


def audited(folder, tensors, rules):
    save_file(tensors, folder / "model.safetensors")
    rules = rules if isinstance(rules, LayerRules) else LayerRules(default=rules)
    return audit(read_headers(folder), rules)


def refused(folder, tensors, rules):
    with pytest.raises(CheckpointError) as caught:
        audited(folder, tensors, rules)
    return str(caught.value)


def fp8_layer(name=Q, dtype=torch.float8_e4m3fn, scale=()):
    return {
        f"{name}.weight": torch.zeros(N, K).to(dtype),
        f"{name}.weight_scale": torch.ones(scale),
    }


@pytest.mark.parametrize("scale", [(), (1,), (1, 1), (N,), (N, 1)])
def test_every_shape_of_a_scale(tmp_path, scale):
    found = audited(tmp_path, fp8_layer(scale=scale), FP8)
    assert found.quantised[Q].shape == SHAPE


def test_another_shape_of_a_scale(tmp_path):
    message = refused(tmp_path, fp8_layer(scale=(3,)), FP8)
    assert f"has shape [3], but [] or [1] or [1, 1] or [{N}, 1] or [{N}] is expected." in message


def test_layers_in_16_bits_among_others_in_8(tmp_path):
    """A router, a layer with a left-over scale and an embedding, none of them quantised."""
    plain = {
        f"{UP}.weight": torch.zeros(N, K).bfloat16(),
        f"{UP}.input_scale": torch.ones(1),
        "model.embed_tokens.weight": torch.zeros(8, K).bfloat16(),
        "model.norm.weight": torch.zeros(K).bfloat16(),
    }
    found = audited(tmp_path, {**fp8_layer(), **plain}, FP8)
    assert (set(found.quantised), found.plain) == ({Q}, (UP,))


def test_static_scale_that_is_missing(tmp_path):
    message = refused(tmp_path, fp8_layer(), STATIC)
    assert f"{Q}.input_scale is missing; the layer has weight, weight_scale" in message


def test_scale_that_is_missing(tmp_path):
    tensors = fp8_layer()
    del tensors[f"{Q}.weight_scale"]
    assert f"{Q}.weight_scale is missing; the layer has weight." in refused(tmp_path, tensors, FP8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_layer_of_8_bits_that_the_rules_leave_in_16(tmp_path, dtype):
    tensors = {f"{Q}.weight": torch.zeros(N, K).to(dtype)}
    assert f"{Q} is stored quantised (it has weight in " in refused(tmp_path, tensors, None)


def test_masks_are_no_weights(tmp_path):
    tensors = {"model.mask.weight": torch.zeros(N, K, dtype=torch.bool)}
    assert audited(tmp_path, tensors, FP8).plain == ()


def test_blocks_that_do_not_fit_the_config(tmp_path):
    tensors = {f"{Q}.weight": fp8_layer()[f"{Q}.weight"], f"{Q}.weight_scale_inv": torch.ones(1, 2)}
    blocks = spec("fp8", group_size=128, scale_rows=128)
    message = refused(tmp_path, tensors, blocks)
    assert f"{Q}.weight_scale_inv in " in message
    assert "has shape [1, 2], but [1, 1] is expected." in message


@pytest.mark.parametrize(
    ("dtype", "usual"),
    [(torch.float8_e4m3fnuz, "float8_e4m3fn"), (torch.float8_e5m2fnuz, "float8_e5m2")],
)
@pytest.mark.parametrize("dialect", ["fp8", "fbgemm_fp8", "compressed-tensors"])
def test_floats_with_another_bias_name_the_conversion(dialect, dtype, usual):
    scheme = spec(dialect).model_copy(update={"variant": "float-quantized"})
    tensor = get_format(dialect).tensors(scheme, SHAPE)[0]
    with pytest.raises(CheckpointError) as caught:
        tensor.check_dtype("x.weight", dtype)
    message = str(caught.value)
    assert f"x.weight has dtype {dtype}, but torch.float8_e4m3fn is expected." in message
    assert f"cast the values to torch.{usual} (not the bits), and keep the scale." in message


@pytest.mark.parametrize(("fmt", "stored"), [("e4m3", "e5m2"), ("e5m2", "e4m3")])
def test_the_other_float_names_the_key(tmp_path, fmt, stored):
    layer = fp8_layer(dtype=FLOAT8_DTYPES[stored])
    message = refused(tmp_path, layer, spec("fp8", scale_rows=ALL_ROWS, code_type=fmt))
    assert f"has dtype {FLOAT8_DTYPES[stored]}, but {FLOAT8_DTYPES[fmt]} is expected" in message
    assert "Set 'fmt' to the weights' float" in message


def test_the_named_conversion_keeps_the_values():
    """Every finite float of the other bias, but for the smallest, whose last bit has no place."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fnuz).float()
    kept = values.isfinite() & ((values.abs() >= 2**-6) | (values == 0))
    assert torch.equal(values.to(torch.float8_e4m3fn).float()[kept], values[kept])
    same_bits = codes.view(torch.float8_e4m3fn).float()
    both = values.isfinite() & same_bits.isfinite()
    assert torch.equal(values[both] * 2, same_bits[both])


def test_headers_of_floats_with_another_bias(tmp_path):
    header = {"a.weight": {"dtype": "F8_E4M3FNUZ", "shape": [2, 2], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(data)
    assert read_headers(tmp_path)["a.weight"].dtype is torch.float8_e4m3fnuz
    with pytest.raises(CheckpointError, match=r"has dtype torch\.float8_e4m3fnuz"):
        audit(
            {**read_headers(tmp_path), "a.weight_scale": scale_header(tmp_path)},
            LayerRules(default=FP8),
        )


def scale_header(folder):
    return TensorHeader((), torch.float32, folder / "model.safetensors")


def test_every_linear_layer_is_quantised_on_arrival(tmp_path):
    tensors = {
        f"{Q}.weight": torch.zeros(N, K).bfloat16(),
        f"{Q}.bias": torch.zeros(N).bfloat16(),
        "model.layers.0.mlp.gate.weight": torch.zeros(8, K),
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.zeros(8),
        "model.embed_tokens.weight": torch.zeros(8, K).bfloat16(),
        "model.conv.weight": torch.zeros(3, 3, 4),
        "model.norm.weight": torch.zeros(K),
        "lm_head.weight": torch.zeros(8, K).bfloat16(),
    }
    found = audited(tmp_path, tensors, ON_ARRIVAL)
    assert set(found.quantised) == {Q, "model.layers.0.mlp.gate"}
    assert found.quantised[Q].spec == ON_ARRIVAL
    assert found.quantised[Q].shape == SHAPE
    assert found.plain == ()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (fp8_layer(), f"{Q}.weight in .* has dtype torch.float8_e4m3fn, but torch.bfloat16 or "),
        ({f"{Q}.weight": torch.zeros(N, K).double()}, "has dtype torch.float64"),
        ({f"{Q}.qweight": torch.zeros(N, K).int()}, f"{Q}.weight is missing; the layer has qwei"),
        (
            {f"{Q}.weight": torch.zeros(N, K).half(), f"{Q}.weight_scale": torch.ones(1)},
            f"{Q}.weight_scale is unexpected: a layer with 16-bit, symmetric",
        ),
    ],
)
def test_what_is_quantised_already_is_not_quantised_on_arrival(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        audited(tmp_path, tensors, ON_ARRIVAL)


def nf4_layer(name=Q, shape=(N, K), **state):
    """A layer of 4 bits, all zero but for its state."""
    content = {"quant_type": "nf4", "blocksize": 64, "shape": shape, **state}
    stored = {
        "weight": torch.zeros(N * K // 2, 1, dtype=torch.uint8),
        "weight.absmax": torch.zeros(N * K // 64),
        "weight.quant_map": torch.zeros(16),
        STATE: torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8),
    }
    return {f"{name}.{key}": tensor for key, tensor in stored.items()}


def test_four_bits_and_their_companions_are_one_layer(tmp_path):
    tensors = {**nf4_layer(), f"{Q}.bias": torch.zeros(N)}
    tensors[f"{Q}.weight.nested_absmax"] = torch.zeros(1)
    tensors[f"{Q}.weight.nested_quant_map"] = torch.zeros(256)
    tensors[f"{UP}.weight"] = torch.zeros(N, K).half()
    found = audited(tmp_path, tensors, NF4)
    assert set(found.quantised) == {Q}
    assert found.quantised[Q].shape == SHAPE
    assert found.plain == (UP,)


@pytest.mark.parametrize("name", ["weight", "weight.absmax", "weight.quant_map", STATE])
def test_tensor_of_four_bits_that_is_missing(tmp_path, name):
    tensors = nf4_layer()
    del tensors[f"{Q}.{name}"]
    message = refused(tmp_path, tensors, NF4)
    assert message.startswith(Q)
    assert f"{name} is missing; the layer has " in message


def test_companion_that_nobody_writes(tmp_path):
    tensors = {**nf4_layer(), f"{Q}.scale": torch.zeros(1)}
    assert f"{Q}.scale is unexpected" in refused(tmp_path, tensors, NF4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((N, 2 * K), f"{Q}.weight in "),
        ((0, K), f"{Q}.{STATE} in "),
        ((N,), f"{Q}.{STATE} in "),
        (None, "holds no shape of the weight"),
        ("24", "cannot be read: its quant_state is not what bitsandbytes writes (shape: "),
    ],
)
def test_size_of_four_bits_that_does_not_fit(tmp_path, shape, message):
    assert message in refused(tmp_path, nf4_layer(shape=shape), NF4)


def test_four_bits_that_the_rules_leave_in_16(tmp_path):
    message = refused(tmp_path, nf4_layer(), None)
    assert f"{Q} is stored quantised (it has weight, weight.absmax, weight.quant_map" in message


INPUTS = {Role.INPUT_SCALE: torch.tensor([0.25]), Role.INPUT_ZERO: torch.tensor([3.0])}

WRITTEN = [
    FP8,
    STATIC,
    spec("fbgemm_fp8"),
    spec("fp8", group_size=64, scale_rows=16),
    spec("bitsandbytes", code_type="int"),
    spec("compressed-tensors", code_type="int").model_copy(
        update={
            "variant": "int-quantized",
            "activation": ActivationSpec(code="int8", dynamic=False, group_size=0, symmetric=False),
        }
    ),
]


@pytest.mark.parametrize("scheme", WRITTEN, ids=lambda scheme: scheme.dialect)
def test_what_we_write_is_what_the_audit_expects_and_we_read(tmp_path, scheme):
    groups = scheme.weight.num_groups(K)
    weight = QuantizedWeight(
        codes=torch.randint(256, (N, K), dtype=torch.uint8),
        scales=torch.full((N, groups), 0.5),
        zeros=torch.full((N, groups), 128, dtype=torch.uint8),
        group_index=(torch.arange(K) // (K // groups)).int(),
        bits=8,
        code_type=scheme.weight.code_type,
    )
    static = scheme.activation is not None and not scheme.activation.dynamic
    exchange = exchange_layers({Q: weight}, scheme, {Q: INPUTS} if static else None)
    stored = exchange[f"{Q}.weight"]
    assert audited(tmp_path, stored, scheme).quantised[Q].shape == SHAPE
    tensors = get_format(scheme.dialect).tensors(scheme, SHAPE)
    expected = {Role.CODES: weight.codes, Role.SCALES: weight.scales, **INPUTS}
    for tensor in tensors:
        if f"{Q}.{tensor.name}" in stored:
            read = tensor.decode(stored[f"{Q}.{tensor.name}"])
            assert torch.equal(read, expected[tensor.role])
    assert {t.name for t in tensors if not t.optional} == {
        key.removeprefix(f"{Q}.") for key in stored
    }
