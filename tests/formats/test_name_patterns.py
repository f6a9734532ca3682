"""Short lists of layer names match what they stand for, and nothing else of the model."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_quantkit.formats._patterns import compact, exact_pattern

LEAVES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LLAMA = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in LEAVES]
EXPERTS = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(4) for e in range(16)]
ROUTERS = [f"model.layers.{i}.mlp.gate" for i in range(4)]
VISION = [f"visual.layers.{i}.self_attn.q_proj" for i in range(12)]


def matched(entries, names):
    """Which of `names` the entries match, as every reader matches: from the start."""
    return [name for name in names if any(re.match(exact_pattern(e), name) for e in entries)]


def test_all_layers_of_a_kind_are_one_entry():
    down = [name for name in LLAMA if name.endswith("down_proj")]
    assert compact(down, LLAMA) == (r"re:(?:.*\.)?layers\.\d+\.mlp\.down_proj$",)


def test_some_blocks_are_listed():
    some = [name for name in LLAMA if name.endswith("down_proj") and ".1" in name]
    assert compact(some, LLAMA) == (r"re:(?:.*\.)?layers\.(?:1|10|11)\.mlp\.down_proj$",)


def test_last_components_share_an_entry():
    (entry,) = compact([name for name in LLAMA if "attn" in name], LLAMA)
    assert entry == r"re:(?:.*\.)?layers\.\d+\.self_attn\.(?:q_proj|k_proj|v_proj)$"


def test_a_single_layer_keeps_its_name():
    assert compact([LLAMA[3], "lm_head"], LLAMA) == ("lm_head", LLAMA[3])


def test_routers_are_not_taken_for_experts():
    assert compact(ROUTERS, EXPERTS) == (r"re:(?:.*\.)?layers\.\d+\.mlp\.gate$",)


def test_a_twin_elsewhere_in_the_model_keeps_the_modules_around():
    q = [name for name in LLAMA if name.endswith("q_proj")]
    (entry,) = compact(q, VISION)
    assert entry == r"re:model\.layers\.\d+\.self_attn\.q_proj$"
    assert matched([entry], VISION + q) == q


def test_written_expressions_stay():
    assert compact(["re:.*gate$", "a-b.c"], LLAMA) == ("re:.*gate$", "a-b.c")


def test_merged_layers_are_matched_where_asked():
    names = [name for name in LLAMA if "attn" in name and ".3." in name]
    (entry,) = compact(names, LLAMA, merged=True)
    assert matched([entry], ["model.layers.3.self_attn.qkv_proj"])
    assert not matched([entry], ["model.layers.4.self_attn.qkv_proj"])
    assert not matched(
        compact(names[:2], LLAMA, merged=True), ["model.layers.3.self_attn.qkv_proj"]
    )


def test_many_experts_stay_short():
    chosen = [name for name in EXPERTS if ".layers.2." in name and not name.endswith("7.up_proj")]
    entries = compact(chosen, EXPERTS)
    assert len(entries) == 1
    assert matched(entries, EXPERTS) == chosen


names = st.lists(st.sampled_from([*LLAMA, *EXPERTS, *ROUTERS, *VISION, "lm_head"]), unique=True)


@settings(max_examples=300, deadline=None)
@given(wanted=names, others=names, merged=st.booleans())
def test_exact(wanted, others, merged):
    others = [name for name in others if name not in wanted]
    entries = compact(wanted, others, merged=merged)
    assert set(matched(entries, wanted)) == set(wanted)
    assert matched(entries, others) == []
    assert len(entries) <= len(wanted)


@pytest.mark.parametrize("name", ["a.b", "a.1.b", "x-y.2.z+w"])
def test_a_name_matches_itself_only(name):
    assert re.match(exact_pattern(name), name)
    assert not re.match(exact_pattern(name), f"{name}.c")
    assert not re.match(exact_pattern(name), name.replace(".", "_"))
