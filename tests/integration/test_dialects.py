"""Every variant of every dialect, many of them in one checkpoint where the dialect allows it."""

import pytest

from tests.integration.engines import EngineHost
from tests.integration.footprints import MEMORY, check_footprint
from tests.integration.foreseen import check_log
from tests.integration.reference import assert_same_scores, prompts, twin_scores
from tests.integration.schemes import awq, compressed, gptq, ruled_checkpoint
from tests.tiny_models import create_tiny_model
from vllm_quantkit.spec import LayerRule, LayerRules, SchemeSpec

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Three layers and a head of its own."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    return create_tiny_model("llama", folder, num_hidden_layers=3)


def check(engines: EngineHost, flag: str, pair) -> list[str]:
    """The engine agrees with the twin; returns what was logged."""
    asked = prompts()
    result = engines.run(pair.quantized, flag, [{"op": "score", "prompts": asked}, MEMORY])
    check_footprint(result.answers[1], pair.quantized, flag)
    check_log(result.log, pair.quantized, flag)
    assert_same_scores(result.answers[0], twin_scores(pair.twin, asked))
    return result.log


def rules_of(
    exceptions: dict[str, SchemeSpec | None], default: SchemeSpec, head: SchemeSpec | None = None
) -> LayerRules:
    return LayerRules(
        rules=tuple(LayerRule(pattern=name, scheme=s) for name, s in exceptions.items()),
        default=default,
        lm_head=head,
    )


@pytest.mark.parametrize(
    ("scheme", "unstored"),
    [
        (awq(-1), ()),
        (awq(16, symmetric=True), ("qzeros",)),
        (awq(64, variant="gemv"), ()),
        (awq(128, symmetric=True, variant="gemv"), ()),
    ],
    ids=lambda value: getattr(value, "variant", None),
)
def test_awq_variants_are_served_exactly(llama, scheme, unstored, tmp_path, engines):
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.weight.group_size,
        "zero_point": not scheme.weight.symmetric,
        "version": scheme.variant,
        "modules_to_not_convert": ["layers.1.mlp"],
    }
    rules = rules_of({".*layers[.]1[.]mlp": None}, scheme)
    pair = ruled_checkpoint(llama, rules, config, tmp_path / "pair", unstored=unstored)

    log = check(engines, "quantkit-awq", pair)

    warnings = [line for line in log if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "model.layers.1.mlp.gate_up_proj, model.layers.1.mlp.down_proj" in warnings[0]


GPTQ_LAYERS = {
    "layers[.]0[.]self_attn[.][qkv]_proj": (2, 32, True, True),
    "layers[.]0[.]self_attn[.]o_proj": (3, 64, False, False),
    "layers[.]0[.]mlp[.](gate|up)_proj": (8, -1, False, True),
    "layers[.]0[.]mlp[.]down_proj": (4, 128, True, False),
    "layers[.]1[.]self_attn[.][qkv]_proj": (3, -1, False, False),
    "layers[.]1[.]self_attn[.]o_proj": (8, 32, False, False),
    "layers[.]1[.]mlp[.](gate|up)_proj": (4, 64, True, False),
    "layers[.]1[.]mlp[.]down_proj": (2, 128, False, True),
}
"""Pattern to bits, group size, desc_act, sym; the rest has symmetric 4 bits in groups of 128."""


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_rules_for_each_layer_are_served_exactly(llama, version, tmp_path, engines):
    """2, 3, 4 and 8 bits, with and without order, with layers in 16 bits and a quantised head."""
    default = gptq(4, 128, version, symmetric=True)
    served = {
        f".*{pattern}": gptq(bits, group, version, symmetric=sym, act_order=order)
        for pattern, (bits, group, order, sym) in GPTQ_LAYERS.items()
    }
    dynamic = {
        f"+:.*{pattern}": {"bits": bits, "group_size": group, "desc_act": order, "sym": sym}
        for pattern, (bits, group, order, sym) in GPTQ_LAYERS.items()
    }
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": True,
        "checkpoint_format": version,
        "dynamic": {r"-:.*layers[.]2[.]mlp[.]down_proj": {}, **dynamic},
    }
    rules = rules_of({".*layers[.]2[.]mlp[.]down_proj": None, **served}, default, default)
    pair = ruled_checkpoint(llama, rules, config, tmp_path / "pair")
    assert "lm_head" in pair.layers

    log = check(engines, "quantkit-gptq", pair)

    assert any("1 linear layers stay in 16 bits: model.layers.2.mlp.down_proj" in s for s in log)


def test_gptq_without_the_tensors_it_may_leave_out_survives_a_reload(llama, tmp_path, engines):
    """No g_idx where groups are in order, no qzeros where all are in the middle; v2 by name."""
    scheme = gptq(4, 64, "gptq_v2", symmetric=True)
    config = {"quant_method": "gptq_v2", "bits": 4, "group_size": 64, "sym": True, "lm_head": True}
    rules = rules_of({}, scheme, scheme)
    pair = ruled_checkpoint(llama, rules, config, tmp_path, unstored=("g_idx", "qzeros"))
    asked = prompts()
    score = {"op": "score", "prompts": asked}

    answers = engines.run(pair.quantized, "quantkit", [score, {"op": "reload"}, score]).answers

    assert_same_scores(answers[0], twin_scores(pair.twin, asked))
    assert answers[2] == answers[0]


def test_gptq_v2_by_method_name_reads_zero_points_as_they_are(llama, tmp_path, engines):
    scheme = gptq(4, 64, "gptq_v2", symmetric=False)
    config = {"quant_method": "gptq_v2", "bits": 4, "group_size": 64, "sym": False}
    pair = ruled_checkpoint(llama, rules_of({}, scheme), config, tmp_path, unstored=("g_idx",))

    check(engines, "quantkit-gptq", pair)


COMPRESSED_GROUPS = [
    (["re:.*layers[.]0[.]self_attn[.]"], (2, 32, False, None)),
    (["re:.*layers[.]0[.]mlp[.](gate|up)_proj"], (3, None, True, None)),
    (["model.layers.0.mlp.down_proj"], (5, 64, False, "group")),
    (["re:.*layers[.]1[.]self_attn[.]"], (6, 128, True, "weight")),
    (["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"], (7, None, False, None)),
    (["model.layers.1.mlp.down_proj"], (8, 16, False, "group")),
    (["Linear"], (4, 64, True, "group")),
]
"""Targets to bits, group size (None per channel), symmetric, actorder."""


def test_compressed_tensors_groups_are_served_exactly(llama, tmp_path, engines):
    """2 to 8 bits, groups and channels, stored and unstored order, ignored layers."""
    groups, exceptions, default = {}, {}, None
    for index, (targets, (bits, size, symmetric, order)) in enumerate(COMPRESSED_GROUPS):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group" if size else "channel",
            "group_size": size,
            "actorder": order,
        }
        groups[f"group_{index}"] = {"targets": targets, "weights": weights}
        scheme = compressed(bits, size or -1, symmetric=symmetric, act_order=order == "group")
        if targets == ["Linear"]:
            default = scheme
        exceptions |= {target.removeprefix("re:"): scheme for target in targets}
    ignore = ["lm_head", "re:.*layers[.]2[.]self_attn"]
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }
    rules = rules_of({".*layers[.]2[.]self_attn": None, **exceptions}, default)
    pair = ruled_checkpoint(llama, rules, config, tmp_path / "pair")
    assert {layer.bits for layer in pair.layers.values()} == set(range(2, 9))

    check(engines, "quantkit", pair)
