"""Every refused config names the key, the value seen and what to do."""

import pytest

from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.formats import get_format

MISSING = object()

AWQ = {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}

AWQ_MALFORMED = [
    ("bits", MISSING, "missing", "integer 4"),
    ("bits", "4", "'4'", "integer 4"),
    ("bits", True, "True", "integer 4"),
    ("bits", 0, "0", "integer 4"),
    ("group_size", MISSING, "missing", "-1 for one scale"),
    ("group_size", 0, "is 0", "positive integer"),
    ("group_size", -2, "-2", "-1 for one scale"),
    ("group_size", 128.5, "128.5", "positive integer"),
    ("group_size", None, "None", "positive integer"),
    ("zero_point", "yes", "'yes'", "true or false"),
    ("zero_point", None, "None", "true or false"),
    ("version", 3, "3", "'gemm' or 'gemv'"),
    ("modules_to_not_convert", "lm_head", "'lm_head'", "a list"),
    ("modules_to_not_convert", [1], "1", "a list"),
    ("modules_to_not_convert", ["a", ""], "['a', '']", "part of every name"),
    ("lm_head", 1, "1", "true or false"),
    ("dynamic", [], "[]", "an object"),
]

GPTQ_MALFORMED = [
    ("bits", MISSING, "missing", "2, 3, 4, 8"),
    ("bits", 4.5, "4.5", "2, 3, 4, 8"),
    ("bits", -4, "-4", "2, 3, 4, 8"),
    ("group_size", MISSING, "missing", "-1 for one scale"),
    ("group_size", 0, "is 0", "positive integer"),
    ("group_size", "128", "'128'", "positive integer"),
    ("sym", "true", "'true'", "true or false"),
    ("desc_act", 0, "0", "true or false"),
    ("checkpoint_format", 2, "2", "'gptq' or 'gptq_v2'"),
    ("lm_head", "no", "'no'", "true or false"),
    ("static_groups", 1, "1", "true or false"),
    ("pack_dtype", 32, "32", "'int32'"),
    ("is_marlin_format", "no", "'no'", "true or false"),
    ("dynamic", ["+:a"], "['+:a']", "an object"),
    ("dynamic", {"+:a": 8}, "8", "an object"),
    ("dynamic", {"+:(": {"bits": 8}}, "'+:('", "regular expression"),
    ("dynamic", {"-:[": {}}, "'-:['", "regular expression"),
    ("dynamic", {"+:a": {"bits": "8"}}, "'8'", "2, 3, 4, 8"),
    ("dynamic", {"+:a": {"group_size": 0}}, "is 0", "positive integer"),
    ("modules_in_block_to_quantize", "mlp", "'mlp'", "a list"),
    ("modules_in_block_to_quantize", [[1]], "1", "a list"),
]

WEIGHTS_MALFORMED = [
    ("num_bits", MISSING, "missing", "2 to 8"),
    ("num_bits", "4", "'4'", "2 to 8"),
    ("num_bits", 0, "0", "2 to 8"),
    ("type", 4, "4", "'int'"),
    ("type", "fixed", "'fixed'", "'int' or 'float'"),
    ("block_structure", [128, 128], "[128, 128]", "strategy 'block'"),
    ("symmetric", "no", "'no'", "true or false"),
    ("strategy", "rows", "'rows'", "'group' or 'channel'"),
    ("group_size", 0, "is 0", "positive integer"),
    ("group_size", None, "None", "positive integer"),
    ("group_size", -3, "-3", "positive integer"),
    ("group_size", "128", "'128'", "positive integer"),
    ("actorder", "random", "'random'", "'group' or 'weight'"),
]

GROUP_MALFORMED = [
    ("targets", MISSING, "missing", "'Linear'"),
    ("targets", "Linear", "'Linear'", "a list"),
    ("targets", ["re:("], "'re:('", "regular expression"),
    ("weights", MISSING, "missing", "num_bits"),
    ("weights", None, "None", "num_bits"),
    ("input_activations", "int8", "'int8'", "null or an object"),
    ("format", 3, "3", "'pack-quantized'"),
]

CONFIG_MALFORMED = [
    ("config_groups", MISSING, "missing", "'targets' and 'weights'"),
    ("config_groups", [], "[]", "'targets' and 'weights'"),
    ("config_groups", {"W4A16": ["Linear"]}, "['Linear']", "'targets' and 'weights'"),
    ("format", None, "None", "'pack-quantized'"),
    ("ignore", "lm_head", "'lm_head'", "a list"),
    ("ignore", ["re:*"], "'re:*'", "regular expression"),
    ("kv_cache_scheme", "fp8", "'fp8'", "null or an object"),
]

AWQ_UNSERVED = [
    ("bits", 5, "5", "bits 4"),
    ("bits", 8, "8", "bits 4"),
    ("version", "gemv_fast", "'gemv_fast'", "version 'gemm'"),
    ("version", "marlin", "'marlin'", "version 'gemm'"),
    ("dynamic", {"-:.*gate": {}}, "gate", "'modules_to_not_convert'"),
]

GPTQ_UNSERVED = [
    ("bits", 5, "5", "2, 3, 4 or 8"),
    ("bits", 16, "16", "2, 3, 4 or 8"),
    ("checkpoint_format", "marlin", "'marlin'", "'gptq_v2'"),
    ("checkpoint_format", "gptq_p", "'gptq_p'", "'gptq_v2'"),
    ("is_marlin_format", True, "'marlin'", "'gptq_v2'"),
    ("pack_dtype", "int16", "'int16'", "'int32'"),
    ("dynamic", {"+:a": {"bits": 6}}, "is 6", "2, 3, 4 or 8"),
]

WEIGHTS_UNSERVED = [
    ("num_bits", 1, "1", "4 or 8 bits"),
    ("num_bits", 16, "16", "4 or 8 bits"),
    ("type", "float", "'float'", "without --quantization"),
    ("strategy", "attn_head", "'attn_head'", "'channel'"),
    ("strategy", "tensor", "'tensor'", "'channel'"),
    ("strategy", "block", "'block'", "'channel'"),
]

GROUP_UNSERVED = [
    ("input_activations", {"num_bits": 8, "dynamic": True}, "'num_bits': 8", "in format 'pack-"),
    ("output_activations", {"num_bits": 8}, "'num_bits': 8", "without --quantization"),
    ("format", "marlin-24", "'marlin-24'", "'pack-quantized'"),
    ("targets", ["LlamaMLP"], "'LlamaMLP'", "Name the layers"),
]

CONFIG_UNSERVED = [
    ("format", "nvfp4-pack-quantized", "'nvfp4-pack-quantized'", "'pack-quantized'"),
    ("ignore", ["Embedding"], "'Embedding'", "Name the layers"),
    ("kv_cache_scheme", {"num_bits": 8}, "'num_bits': 8", "--kv-cache-dtype"),
    ("transform_config", {"config_groups": {}}, "config_groups", "without --quantization"),
    ("sparsity_config", {"format": "x"}, "'format': 'x'", "without sparse compression"),
]


def changed(base, key, value):
    config = {name: kept for name, kept in base.items() if name != key}
    return config if value is MISSING else {**config, key: value}


UNCHANGED = ("producer", "a key nobody knows")


def compressed(config=UNCHANGED, group=UNCHANGED, weights=UNCHANGED):
    """A good config with one key changed at one level."""
    good_weights = {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True}
    good_group = {"targets": ["Linear"], "weights": changed(good_weights, *weights)}
    good = {"config_groups": {"g": changed(good_group, *group)}, "format": "pack-quantized"}
    return changed(good, *config)


def check(error, dialect, config, *parts):
    with pytest.raises(error) as caught:
        get_format(dialect).parse(config)
    message = str(caught.value)
    for part in (f"{dialect} config", *parts):
        assert part in message
    assert message.endswith((".", ")"))


def test_the_unchanged_configs_are_good():
    get_format("awq").parse(AWQ)
    get_format("gptq").parse(GPTQ)
    get_format("compressed-tensors").parse(compressed())


@pytest.mark.parametrize(("key", "value", "seen", "fix"), AWQ_MALFORMED)
def test_awq_malformed(key, value, seen, fix):
    check(ConfigError, "awq", changed(AWQ, key, value), key, seen, fix)


@pytest.mark.parametrize(("key", "value", "seen", "fix"), AWQ_UNSERVED)
def test_awq_unserved(key, value, seen, fix):
    check(UnsupportedScheme, "awq", changed(AWQ, key, value), key, seen, fix)


@pytest.mark.parametrize(("key", "value", "seen", "fix"), GPTQ_MALFORMED)
def test_gptq_malformed(key, value, seen, fix):
    check(ConfigError, "gptq", changed(GPTQ, key, value), key, seen, fix)


@pytest.mark.parametrize(("key", "value", "seen", "fix"), GPTQ_UNSERVED)
def test_gptq_unserved(key, value, seen, fix):
    key_in_message = "checkpoint_format" if key == "is_marlin_format" else key
    check(UnsupportedScheme, "gptq", changed(GPTQ, key, value), key_in_message, seen, fix)


@pytest.mark.parametrize(
    ("error", "level", "table"),
    [
        (ConfigError, "weights", WEIGHTS_MALFORMED),
        (ConfigError, "group", GROUP_MALFORMED),
        (ConfigError, "config", CONFIG_MALFORMED),
        (UnsupportedScheme, "weights", WEIGHTS_UNSERVED),
        (UnsupportedScheme, "group", GROUP_UNSERVED),
        (UnsupportedScheme, "config", CONFIG_UNSERVED),
    ],
)
def test_compressed_tensors(error, level, table):
    for key, value, seen, fix in table:
        config = compressed(**{level: (key, value)})
        check(error, "compressed-tensors", config, key, seen, fix)


def test_nested_keys_are_named_by_path():
    with pytest.raises(ConfigError, match=r"'config_groups\.g\.weights\.num_bits' is '4'"):
        get_format("compressed-tensors").parse(compressed(weights=("num_bits", "4")))


def test_dynamic_errors_name_the_rule():
    with pytest.raises(ConfigError, match=r"rule '\+:a' of 'dynamic'"):
        get_format("gptq").parse({**GPTQ, "dynamic": {"+:a": {"bits": "8"}}})


def test_unknown_dialect():
    with pytest.raises(UnsupportedScheme, match=r"'fp9' is not served by quantkit; it serves awq"):
        get_format("fp9")
