"""The quantkit dialect: streams built bit by bit, and what its config says."""

import pytest
import torch

from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.formats import Role
from vllm_quantkit.formats import quantkit as fmt
from vllm_quantkit.spec import ActivationSpec, LayerShape, SchemeSpec, WeightSpec


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def spec(activation=None, **weight):
    numerics = {"bits": 3, "group_size": 16, "symmetric": False, **weight}
    return SchemeSpec(dialect="quantkit", weight=WeightSpec(**numerics), activation=activation)


def by_role(scheme, N, K):
    shape = LayerShape(out_features=N, in_features=K)
    return {tensor.role: tensor for tensor in fmt.tensors(scheme, shape)}


def stream(values, bits, words):
    """The bits of a row as Python integers, cut into signed words of 32."""
    number = sum(int(value) << (bits * i) for i, value in enumerate(values))
    cut = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(words)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in cut]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("K", [1, 31, 32, 33, 100])
def test_codes_are_a_dense_stream(bits, K):
    N, words = 3, -(-K * bits // 32)
    codes = torch.randint(2**bits, (N, K), dtype=torch.uint8)
    expected = [stream(row, bits, words) for row in codes.tolist()]
    tensor = by_role(spec(bits=bits), N, K)[Role.CODES]
    assert tensor.shape == (N, words)
    assert tensor.encode(codes).tolist() == expected
    assert torch.equal(tensor.decode(torch.tensor(expected, dtype=torch.int32)), codes)


def test_blocks_of_rows_store_zero_points_once():
    scheme = spec(bits=5, scale_rows=4)
    zeros = torch.randint(32, (2, 3), dtype=torch.uint8).repeat_interleave(4, 0)[:7]
    tensor = by_role(scheme, 7, 48)[Role.ZEROS]
    expected = [stream(zeros[row], 5, 1) for row in (0, 4)]
    assert tensor.encode(zeros).tolist() == expected
    assert torch.equal(tensor.decode(torch.tensor(expected, dtype=torch.int32)), zeros)
    zeros[1] = 0
    zeros[2] = 31
    with pytest.raises(ValueError, match="rows differ inside a block of 4"):
        tensor.encode(zeros)


def test_only_what_is_needed_is_stored():
    static = ActivationSpec(code="int8", dynamic=False, group_size=0, symmetric=False)
    plain = {Role.CODES, Role.SCALES, Role.SHAPE}
    assert set(by_role(spec(symmetric=True), 4, 8)) == plain
    assert set(by_role(spec(act_order=True), 4, 8)) == plain | {Role.ZEROS, Role.GROUP_INDEX}
    eight = spec(static, bits=8, group_size=-1, symmetric=True)
    assert set(by_role(eight, 4, 8)) == plain | {Role.INPUT_SCALE, Role.INPUT_ZERO}


CONFIG = {
    "quant_method": "quantkit",
    "version": 1,
    "groups": [
        {
            "layers": ["a.b", r"re:.*\.c$"],
            "weight": {"bits": 3, "group_size": 16, "symmetric": False},
        },
        {
            "layers": [r"re:a\..*"],
            "weight": {"bits": 8, "group_size": -1, "symmetric": True},
            "activation": {"code": "int8"},
        },
    ],
}


def test_the_first_group_that_lists_a_layer_has_it():
    rules = fmt.parse(CONFIG)
    eight = spec(ActivationSpec(code="int8"), bits=8, group_size=-1, symmetric=True)
    assert rules.scheme_for("a.b") == spec()
    assert rules.scheme_for("x.c") == spec()
    assert rules.scheme_for("a.c") == spec()
    assert rules.scheme_for("a.b.d") == eight
    assert rules.scheme_for("b") is None
    assert rules.scheme_for("lm_head") is None


def changed(group=None, weight=None, **top):
    first = {**CONFIG["groups"][0], **(group or {})}
    first["weight"] = {**first["weight"], **(weight or {})}
    return {**CONFIG, "groups": [first], **top}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(version="1"), "'version' is '1', but it must be the integer 1"),
        ({"quant_method": "quantkit", "version": 1}, "'groups' is missing"),
        (changed({"layers": None}), "layers' is None, but it must be a list of layer names"),
        (
            changed({"layers": ["re:("]}),
            r"'layers' is 're:\(', but it must be a regular expression",
        ),
        (changed(weight={"bits": 9}), "bits' is 9, but it must be an integer from 2 to 8"),
        (changed(weight={"group_size": 0}), "'group_size' is 0, but it must be a positive integer"),
        (changed(weight={"code_type": "x"}), "code_type' is 'x', but it must be 'int'"),
        (changed({"activation": {"code": "int4"}}), r"'activation\.code' is 'int4'"),
        (
            changed({"activation": {"code": "int8", "dynamic": False}}),
            "'activation' .* static activation scales are per tensor",
        ),
    ],
)
def test_malformed(config, message):
    with pytest.raises(ConfigError, match=f"quantkit config: key .*{message}"):
        fmt.parse(config)


def test_a_later_version_is_refused():
    with pytest.raises(UnsupportedScheme, match=r"'version' is 2, .* with the vllm-quantkit that"):
        fmt.parse(changed(version=2))
