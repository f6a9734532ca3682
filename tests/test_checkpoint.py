"""The audit: a good checkpoint passes, and every fault is named before loading."""

import pytest
import torch
from safetensors.torch import save_file

from vllm_quantkit.checkpoint import (
    TensorHeader,
    audit,
    read_headers,
)
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.formats import get_format
from vllm_quantkit.spec import (
    ALL_ROWS,
    ActivationSpec,
    LayerRules,
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

N, K = 24, 96
SHAPE = LayerShape(out_features=N, in_features=K)
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def scheme(dialect, **weight):
    numerics = {"bits": 4, "group_size": 32, "symmetric": False, **weight}
    return SchemeSpec(dialect=dialect, weight=WeightSpec(**numerics))


def eight_bits(dialect, activation=None, variant="", **weight):
    numerics = {"bits": 8, "group_size": -1, "symmetric": True, "code_type": "e4m3", **weight}
    return SchemeSpec(
        dialect=dialect, weight=WeightSpec(**numerics), variant=variant, activation=activation
    )


STATIC = ActivationSpec(code="e4m3", dynamic=False, group_size=0)
INT8_STATIC = ActivationSpec(code="int8", dynamic=False, group_size=0, symmetric=False)

SCHEMES = [
    eight_bits("fp8", STATIC, scale_rows=ALL_ROWS),
    eight_bits("fp8", scale_rows=ALL_ROWS),
    eight_bits("fp8", group_size=64, scale_rows=16),
    eight_bits("fbgemm_fp8", ActivationSpec(code="e4m3", upper_bound=1200.0)),
    eight_bits("compressed-tensors", None, "float-quantized"),
    eight_bits("compressed-tensors", INT8_STATIC, "int-quantized", code_type="int"),
    eight_bits(
        "compressed-tensors",
        None,
        "naive-quantized",
        code_type="int",
        symmetric=False,
        group_size=32,
    ),
    eight_bits("bitsandbytes", ActivationSpec(code="int8"), code_type="int"),
    scheme("awq"),
    scheme("awq").model_copy(update={"variant": "gemv"}),
    scheme("gptq", bits=3),
    scheme("gptq", act_order=True),
    scheme("gptq", symmetric=True),
    scheme("compressed-tensors"),
    scheme("compressed-tensors", bits=3, group_size=-1, symmetric=True),
    scheme("compressed-tensors", act_order=True),
]


def layer_tensors(spec, name=Q):
    """A layer's tensors, as its dialect stores them, all zero but for the size."""
    stored = {
        f"{name}.{tensor.name}": torch.zeros(tensor.shape, dtype=tensor.dtypes[0])
        for tensor in get_format(spec.dialect).tensors(spec, SHAPE)
    }
    if f"{name}.weight_shape" in stored:
        stored[f"{name}.weight_shape"] = torch.tensor([N, K])
    return stored


def plain_tensors():
    """What surrounds quantised layers in a checkpoint."""
    return {
        "model.embed_tokens.weight": torch.zeros(8, K, dtype=torch.float16),
        "model.norm.weight": torch.zeros(K, dtype=torch.float16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        f"{Q}.bias": torch.zeros(N, dtype=torch.float16),
        f"{Q}.k_scale": torch.ones(1),
        "model.conv.weight": torch.zeros(3, 3, 4, 4),
        "lm_head.weight": torch.zeros(8, K, dtype=torch.float16),
    }


def save(folder, tensors, name="model.safetensors"):
    save_file(tensors, folder / name)
    return folder


def audited(folder, tensors, spec, rules=None):
    save(folder, tensors)
    return audit(read_headers(folder), rules or LayerRules(default=spec))


@pytest.mark.parametrize("spec", SCHEMES)
def test_good_checkpoint(tmp_path, spec):
    plain = {f"{UP}.weight": torch.zeros(N, K, dtype=torch.float16)}
    found = audited(tmp_path, {**plain_tensors(), **layer_tensors(spec), **plain}, spec)
    assert set(found.quantised) == {Q}
    assert found.quantised[Q].spec == spec
    assert found.quantised[Q].shape == SHAPE
    assert found.plain == (UP,)


def test_layers_that_the_rules_leave_alone_are_not_reported(tmp_path):
    tensors = {f"{UP}.weight": torch.zeros(N, K)}
    assert audited(tmp_path, tensors, None).plain == ()


def test_scaled_activations_are_no_layer(tmp_path):
    spec = scheme("awq")
    tensors = {**layer_tensors(spec), "model.layers.0.mlp.act.scales": torch.ones(K).half()}
    assert set(audited(tmp_path, tensors, spec).quantised) == {Q}


def fault(folder, spec, change):
    """The audit's message after `change` was made to a good layer."""
    tensors = layer_tensors(spec)
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        audited(folder, tensors, spec)
    return str(caught.value)


@pytest.mark.parametrize("spec", SCHEMES)
def test_every_required_tensor_is_missed(tmp_path, spec):
    for tensor in get_format(spec.dialect).tensors(spec, SHAPE):
        if not tensor.optional:
            message = fault(tmp_path, spec, lambda t, name=tensor.name: t.pop(f"{Q}.{name}"))
            assert f"{Q}.{tensor.name} is missing; the layer has " in message
            assert message.endswith("if the layer has another scheme.")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (scheme("awq", symmetric=True), "qzeros"),
        (scheme("gptq", symmetric=True), "qzeros"),
        (scheme("gptq"), "g_idx"),
        (eight_bits("fp8", scale_rows=ALL_ROWS), "input_scale"),
        (eight_bits("bitsandbytes", code_type="int"), "weight_format"),
    ],
)
def test_optional_tensors_may_lack(tmp_path, spec, name):
    tensors = layer_tensors(spec)
    del tensors[f"{Q}.{name}"]
    assert audited(tmp_path, tensors, spec).quantised[Q].shape == SHAPE


@pytest.mark.parametrize("name", ["weight", "g_idx", "lora_a"])
def test_unexpected_tensor(tmp_path, name):
    message = fault(tmp_path, scheme("awq"), lambda t: t.update({f"{Q}.{name}": torch.zeros(3)}))
    assert f"{Q}.{name} is unexpected: a layer with awq" in message
    assert "qweight, qzeros, scales" in message


@pytest.mark.parametrize("spec", SCHEMES)
def test_every_wrong_shape_is_found(tmp_path, spec):
    dialect = get_format(spec.dialect)
    for tensor in dialect.tensors(spec, SHAPE):
        wrong = torch.zeros(*tensor.shape, 2).to(tensor.dtypes[0])
        message = fault(tmp_path, spec, lambda t, n=tensor.name, w=wrong: t.update({f"{Q}.{n}": w}))
        assert f"{Q}.{tensor.name} in " in message
        assert f"has shape {[*tensor.shape, 2]}, but " in message
        assert "expected." in message


@pytest.mark.parametrize("spec", SCHEMES)
def test_every_wrong_dtype_is_found(tmp_path, spec):
    for tensor in get_format(spec.dialect).tensors(spec, SHAPE):
        wrong = torch.zeros(tensor.shape, dtype=torch.int16)
        message = fault(tmp_path, spec, lambda t, n=tensor.name, w=wrong: t.update({f"{Q}.{n}": w}))
        assert f"{Q}.{tensor.name} in " in message
        assert "dtype torch.int16, but " in message


def test_group_size_that_does_not_fit_the_config(tmp_path):
    tensors = layer_tensors(scheme("awq"))
    message_start = rf"{Q}\.scales in .* has shape \[3, 24\], but \[6, 24\] is expected\. Correct"
    with pytest.raises(CheckpointError, match=message_start):
        audited(tmp_path, tensors, scheme("awq", group_size=16))


def test_layer_that_the_rules_leave_in_16_bits(tmp_path):
    tensors = layer_tensors(scheme("awq"))
    with pytest.raises(CheckpointError, match=f"{Q} is stored quantised .*qweight, qzeros, scales"):
        audited(tmp_path, tensors, None)


def test_dialect_that_the_config_does_not_name(tmp_path):
    tensors = layer_tensors(scheme("gptq"))
    with pytest.raises(CheckpointError, match=r"weight_packed is missing; the layer has g_idx"):
        audited(tmp_path, tensors, scheme("compressed-tensors"))


@pytest.mark.parametrize("size", [[N, K + 64], [N + 8, K], [0, K]])
def test_stored_size_that_does_not_fit(tmp_path, size):
    def change(tensors):
        tensors[f"{Q}.weight_shape"] = torch.tensor(size)

    assert f"{Q}.weight_" in fault(tmp_path, scheme("compressed-tensors"), change)


def test_headers_alone_are_enough(tmp_path):
    """Where the file cannot be read again, the size comes from groups and words."""
    spec = scheme("compressed-tensors", bits=3)
    headers = {
        name: TensorHeader(tuple(tensor.shape), tensor.dtype, tmp_path / "gone.safetensors")
        for name, tensor in layer_tensors(spec).items()
    }
    assert audit(headers, LayerRules(default=spec)).quantised[Q].shape == SHAPE
