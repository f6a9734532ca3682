"""GPTQ: streams built from Python's unbounded integers, and the config's meaning."""

import pytest
import torch

from vllm_quantkit.formats import gptq
from vllm_quantkit.spec import LayerShape, SchemeSpec, WeightSpec

CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
}
UP = "model.layers.3.mlp.up_proj"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def spec(variant="gptq", **weight):
    numerics = {"bits": 4, "group_size": 128, "symmetric": True, **weight}
    return SchemeSpec(dialect="gptq", weight=WeightSpec(**numerics), variant=variant)


def stored_by_name(fmt_spec, N, K):
    shape = LayerShape(out_features=N, in_features=K)
    return {tensor.name: tensor for tensor in gptq.tensors(fmt_spec, shape)}


def to_words(value, count):
    """An unbounded integer as `count` signed 32-bit words, lowest first."""
    words = [(value >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def stream(fields, bits, count):
    return to_words(sum(int(field) << (bits * i) for i, field in enumerate(fields)), count)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_a_stream_along_inputs(bits):
    N, K = 3, 64
    codes = torch.randint(2**bits, (N, K), dtype=torch.uint8)
    columns = [stream(row, bits, K * bits // 32) for row in codes]
    expected = torch.tensor(columns, dtype=torch.int32).t()
    tensor = stored_by_name(spec(bits=bits), N, K)["qweight"]
    assert torch.equal(tensor.encode(codes), expected)
    assert torch.equal(tensor.decode(expected), codes)


def test_three_bit_words_follow_the_documented_cut():
    """10 codes, 2 bits of one; 1 bit of it, 10 codes, 1 bit of one; 2 bits of it, 10 codes."""
    codes = torch.randint(8, (1, 32), dtype=torch.uint8)
    x = [int(code) for code in codes[0]]
    first = sum(x[i] << (3 * i) for i in range(10)) | (x[10] & 3) << 30
    second = x[10] >> 2 | sum(x[11 + i] << (3 * i + 1) for i in range(10)) | (x[21] & 1) << 31
    third = x[21] >> 1 | sum(x[22 + i] << (3 * i + 2) for i in range(10))
    words = to_words(first | second << 32 | third << 64, 3)
    stored = stored_by_name(spec(bits=3), 1, 32)["qweight"].encode(codes)
    assert stored.flatten().tolist() == words


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_second_format_stores_zero_points_as_they_are(bits):
    N = 64
    zeros = torch.randint(2**bits, (N, 1), dtype=torch.uint8)
    expected = torch.tensor([stream(zeros[:, 0], bits, N * bits // 32)], dtype=torch.int32)
    tensor = stored_by_name(spec("gptq_v2", bits=bits, group_size=-1), N, 64)["qzeros"]
    assert torch.equal(tensor.encode(zeros), expected)
    assert torch.equal(tensor.decode(expected), zeros)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_first_format_borrows_within_a_word(bits):
    N, per_word = 64, 32 // bits
    zeros = torch.randint(2**bits, (N, 1), dtype=torch.uint8)
    ones = sum(1 << (bits * i) for i in range(per_word))
    words = [
        (sum(int(z) << (bits * i) for i, z in enumerate(part[:, 0])) - ones) & 0xFFFFFFFF
        for part in zeros.split(per_word)
    ]
    expected = torch.tensor([[w - (1 << 32) if w >= 1 << 31 else w for w in words]])
    tensor = stored_by_name(spec(bits=bits, group_size=-1), N, 64)["qzeros"]
    assert torch.equal(tensor.encode(zeros), expected.int())
    assert torch.equal(tensor.decode(expected.int()), zeros)


def test_first_format_at_three_bits_wraps_each_field():
    zeros = torch.randint(8, (32, 1), dtype=torch.uint8)
    expected = torch.tensor([stream([(int(z) - 1) & 7 for z in zeros[:, 0]], 3, 3)]).int()
    tensor = stored_by_name(spec(bits=3, group_size=-1), 32, 32)["qzeros"]
    assert torch.equal(tensor.encode(zeros), expected)
    assert torch.equal(tensor.decode(expected), zeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_first_format_symmetric_stores_the_middle_less_one(bits):
    """The familiar constant 0x77777777 of 4-bit checkpoints, and its likes."""
    tensor = stored_by_name(spec(bits=bits, group_size=-1), 32, 32)["qzeros"]
    stored = torch.tensor([stream([2 ** (bits - 1) - 1] * 32, bits, bits)], dtype=torch.int32)
    assert torch.equal(tensor.decode(stored), torch.full((32, 1), 2 ** (bits - 1)).byte())
    if bits == 4:
        assert set(stored.flatten().tolist()) == {0x77777777}


def test_optional_tensors():
    symmetric = stored_by_name(spec(), 32, 128)
    assert symmetric["qzeros"].optional
    assert symmetric["g_idx"].optional
    ordered = stored_by_name(spec(symmetric=False, act_order=True), 32, 128)
    assert not ordered["qzeros"].optional
    assert not ordered["g_idx"].optional


def test_parse():
    rules = gptq.parse({**CONFIG, "meta": {"quantizer": ["x"]}, "true_sequential": True})
    assert rules.default == spec()
    assert rules.scheme_for(UP) == spec()
    assert rules.scheme_for("lm_head") is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bits": 3, "sym": False}, spec(bits=3, symmetric=False)),
        ({"desc_act": True}, spec(act_order=True)),
        ({"desc_act": True, "group_size": -1}, spec(group_size=-1)),
        ({"checkpoint_format": "gptq_v2"}, spec("gptq_v2")),
        ({"checkpoint_format": None}, spec()),
        ({"checkpoint_format": None, "format": "gptq_v2"}, spec("gptq_v2")),
        ({"checkpoint_format": "gptq_v2", "format": "gptq"}, spec("gptq_v2")),
        ({"dynamic": {}, "modules_in_block_to_quantize": None, "pack_dtype": None}, spec()),
    ],
)
def test_parse_variants(change, expected):
    assert gptq.parse({**CONFIG, **change}).default == expected


def test_legacy_config_without_format():
    assert gptq.parse({"bits": 8, "group_size": 64}).default == spec(bits=8, group_size=64)


def test_dynamic_first_match_wins():
    rules = gptq.parse(
        {
            **CONFIG,
            "dynamic": {
                r"-:.*\.gate$": {},
                r"+:.*\.layers\.3\..*": {"bits": 8, "group_size": 64, "damp_percent": 0.1},
                r".*\.mlp\..*": {"sym": False, "desc_act": True},
            },
        }
    )
    assert rules.scheme_for("model.layers.3.mlp.gate") is None
    assert rules.scheme_for(UP) == spec(bits=8, group_size=64)
    assert rules.scheme_for("model.layers.4.mlp.up_proj") == spec(symmetric=False, act_order=True)
    assert rules.scheme_for("model.layers.4.self_attn.q_proj") == spec()
    assert set(rules.schemes) == {
        spec(),
        spec(bits=8, group_size=64),
        spec(symmetric=False, act_order=True),
    }


def test_dynamic_leaves_the_head_alone_unless_it_is_quantised():
    dynamic = {"+:.*": {"bits": 8}}
    assert gptq.parse({**CONFIG, "dynamic": dynamic}).scheme_for("lm_head") is None
    rules = gptq.parse({**CONFIG, "dynamic": dynamic, "lm_head": True})
    assert rules.scheme_for("lm_head") == spec(bits=8)
    assert gptq.parse({**CONFIG, "lm_head": True}).scheme_for("lm_head") == spec()


@pytest.mark.parametrize("nested", [True, False])
def test_only_listed_modules_are_quantised(nested):
    names = ["self_attn.q_proj", "mlp.up_proj"]
    listed = [[name] for name in names] if nested else names
    config = {**CONFIG, "modules_in_block_to_quantize": listed, "lm_head": True}
    rules = gptq.parse({**config, "dynamic": {"+:.*": {"bits": 8}}})
    assert rules.scheme_for(UP) == spec(bits=8)
    assert rules.scheme_for("model.layers.3.mlp.down_proj") is None
    assert rules.scheme_for("lm_head") == spec(bits=8)


@pytest.mark.parametrize(
    "written", [spec(), spec("gptq_v2", bits=3, symmetric=False), spec(act_order=True, bits=2)]
)
def test_render_is_what_parse_reads(written):
    rules = gptq.parse(gptq.render({"c": written}, ("lm_head", "a.b", r"re:.*\.gate$")))
    assert rules.default == written
    assert rules.scheme_for("a.b") is None
    assert rules.scheme_for("axb") == written
    assert rules.scheme_for("a.b.c") == written
    assert rules.scheme_for("x.gate") is None
    assert rules.scheme_for("lm_head") is None
