"""Refused configs of 8-bit dialects, and of 4 bits of bitsandbytes, name key, value and fix."""

import pytest

from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.formats import get_format

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

EIGHT_BIT_MALFORMED = [
    (FP8, "activation_scheme", "sometimes", "'sometimes'", "'static' or 'dynamic'"),
    (FP8, "weight_block_size", [128], "[128]", "two positive integers"),
    (FP8, "weight_block_size", [128, 0], "[128, 0]", "two positive integers"),
    (FP8, "weight_block_size", 128, "128", "two positive integers"),
    (FP8, "fmt", 43, "43", "'e4m3' or 'e5m2'"),
    (FP8, "scale_fmt", "e8", "'e8'", "'float' or 'ue8m0'"),
    (FP8, "ignored_layers", "lm_head", "'lm_head'", "a list"),
    (FP8, "ignored_layers", ["re:("], "'re:('", "regular expression"),
    (FP8, "modules_to_not_convert", [1], "1", "a list"),
    (FBGEMM, "activation_scale_ub", 0, "0", "a positive number"),
    (FBGEMM, "activation_scale_ub", "1200", "'1200'", "a positive number"),
    (FBGEMM, "modules_to_not_convert", "mlp", "'mlp'", "a list"),
    (BNB8, "load_in_8bit", "yes", "'yes'", "true or false"),
    (BNB8, "load_in_8bit", False, "False", "true for one of"),
    (BNB4, "load_in_8bit", True, "True", "true for one of"),
    (BNB8, "llm_int8_threshold", -1.0, "-1.0", "not negative"),
    (BNB8, "llm_int8_skip_modules", "lm_head", "'lm_head'", "a list"),
    (BNB8, "llm_int8_has_fp16_weight", 1, "1", "true or false"),
    (BNB4, "bnb_4bit_quant_type", "int4", "'int4'", "'nf4' or 'fp4'"),
    (BNB4, "bnb_4bit_quant_storage", 8, "8", "'uint8'"),
]

EIGHT_BIT_UNSERVED = [
    (FP8, "fmt", "e3m4", "'e3m4'", "'e4m3' and 'e5m2'"),
    (FP8, "store_dtype", "mxfp4", "'mxfp4'", "without --quantization"),
    (FP8, "modules_to_convert", ["embed_tokens"], "embed_tokens", "without --quantization"),
    (BNB8, "llm_int8_has_fp16_weight", True, "True", "int8"),
    (BNB4, "bnb_4bit_quant_storage", "bfloat16", "'bfloat16'", "'uint8'"),
]


def refused(error, dialect, config, *parts):
    """The config is refused, in words that hold all `parts`."""
    with pytest.raises(error) as caught:
        get_format(dialect).parse(config)
    message = str(caught.value)
    for part in (f"{dialect} config", *parts):
        assert part in message
    assert message.endswith((".", ")"))


@pytest.mark.parametrize("config", [FP8, FBGEMM, BNB8, BNB4])
def test_the_unchanged_configs_are_good(config):
    assert get_format(config["quant_method"]).parse(config).default is not None


@pytest.mark.parametrize(("base", "key", "value", "seen", "fix"), EIGHT_BIT_MALFORMED)
def test_eight_bit_malformed(base, key, value, seen, fix):
    refused(ConfigError, base["quant_method"], {**base, key: value}, key, seen, fix)


@pytest.mark.parametrize(("base", "key", "value", "seen", "fix"), EIGHT_BIT_UNSERVED)
def test_eight_bit_unserved(base, key, value, seen, fix):
    refused(UnsupportedScheme, base["quant_method"], {**base, key: value}, key, seen, fix)


def test_static_scales_of_blocks():
    config = {**FP8, "activation_scheme": "static", "weight_block_size": [128, 128]}
    refused(
        UnsupportedScheme, "fp8", config, "activation_scheme", "'static'", "Set it to 'dynamic'"
    )


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT_ROWS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FLOAT_ROWS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}

PLAIN_REFUSED = [
    ("float-quantized", INT8, None, "type", "'int'", "'float' in format 'float-quantized'"),
    ("int-quantized", FLOAT8, None, "type", "'float'", "'int' in format 'int-quantized'"),
    ("naive-quantized", {**FLOAT8, "num_bits": 4}, None, "num_bits", "is 4", "8"),
    ("naive-quantized", {**FLOAT8, "symmetric": False}, None, "symmetric", "False", "true"),
    ("naive-quantized", {**INT8, "strategy": "token"}, None, "strategy", "'token'", "'channel'"),
    ("naive-quantized", {**INT8, "num_bits": 16}, None, "num_bits", "is 16", "4 or 8 bits"),
    ("int-quantized", {**INT8, "num_bits": 4}, INT_ROWS, "weights", "4 bits", "null"),
    (
        "int-quantized",
        {**INT8, "strategy": "group", "group_size": 64},
        INT_ROWS,
        "group_size",
        "64",
        "strategy 'channel'",
    ),
    ("int-quantized", INT8, {**INT_ROWS, "num_bits": 4}, "num_bits", "4", "8-bit activations"),
    ("int-quantized", INT8, FLOAT_ROWS, "type", "'float'", "here 'int'"),
    ("float-quantized", FLOAT8, INT_ROWS, "type", "'int'", "here 'float'"),
    ("float-quantized", FLOAT8, {**FLOAT_ROWS, "num_bits": 4}, "num_bits", "4", "8"),
    ("float-quantized", FLOAT8, {**FLOAT_ROWS, "symmetric": False}, "symmetric", "False", "true"),
    ("float-quantized", FLOAT8, {**FLOAT_ROWS, "dynamic": "local"}, "dynamic", "'local'", "true"),
    ("float-quantized", FLOAT8, {**FLOAT_ROWS, "dynamic": False}, "strategy", "'token'", "true"),
    ("int-quantized", INT8, {**INT_ROWS, "strategy": "channel"}, "strategy", "'channel'", "token"),
    (
        "int-quantized",
        INT8,
        {**INT_ROWS, "strategy": "tensor", "symmetric": False},
        "symmetric",
        "False",
        "per token",
    ),
    (
        "float-quantized",
        {**FLOAT8, "strategy": "block", "block_structure": [64, 128]},
        {**FLOAT_ROWS, "strategy": "group", "group_size": 64},
        "group_size",
        "64",
        "groups of 128",
    ),
    (
        "float-quantized",
        {**FLOAT8, "strategy": "group", "group_size": 64, "actorder": "group"},
        FLOAT_ROWS,
        "actorder",
        "'group'",
        "actorder 'weight'",
    ),
]


@pytest.mark.parametrize(("stored", "weights", "inputs", "key", "seen", "fix"), PLAIN_REFUSED)
def test_plain_formats_refuse(stored, weights, inputs, key, seen, fix):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {"format": stored, "config_groups": {"g": group}}
    refused(UnsupportedScheme, "compressed-tensors", config, key, seen, fix)


PLAIN_MALFORMED = [
    ({**INT8, "strategy": "block"}, None, "block_structure", "None"),
    ({**INT8, "strategy": "block", "block_structure": "128"}, None, "block_structure", "'128'"),
    ({**INT8, "strategy": "block", "block_structure": [0, 8]}, None, "block_structure", "[0, 8]"),
    ({**INT8, "type": "fixed"}, None, "type", "'fixed'"),
    (INT8, {**INT_ROWS, "type": "fixed"}, "type", "'fixed'"),
    (INT8, {**INT_ROWS, "dynamic": "never"}, "dynamic", "'never'"),
    (INT8, {**INT_ROWS, "dynamic": 1}, "dynamic", "1"),
    (INT8, {**INT_ROWS, "strategy": "group"}, "group_size", "None"),
    (INT8, {**INT_ROWS, "group_size": 64}, "group_size", "64"),
]


@pytest.mark.parametrize(("weights", "inputs", "key", "seen"), PLAIN_MALFORMED)
def test_plain_formats_malformed(weights, inputs, key, seen):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {"format": "naive-quantized", "config_groups": {"g": group}}
    refused(ConfigError, "compressed-tensors", config, key, seen, "must be")


def test_no_config_is_in_16_bits():
    fmt = get_format("16-bit")
    with pytest.raises(UnsupportedScheme, match=r"no quantization_config.*--quantization"):
        fmt.parse({})
    with pytest.raises(UnsupportedScheme, match=r"no quantization_config.*--quantization"):
        fmt.render({}, ())
